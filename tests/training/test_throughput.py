"""Speeds over a window of steps, and what a machine can do."""

import pytest
import torch

from swissarmy.training.flops import PartCost, TrainingCost
from swissarmy.training.throughput import Meter, measured_peak, peak_flops, peak_memory
from tests.training.callbacks.played import report_of

CPU = torch.device("cpu")


def test_speeds_are_over_the_last_steps_only() -> None:
    meter = Meter(2)
    for step, seconds in enumerate((60.0, 0.5, 1.5), 1):
        meter.add(report_of(step, seconds=seconds, waited=0.1, tokens=100, samples=10))
    speeds = meter.speeds()
    assert speeds.pop("waited") == pytest.approx(0.1)
    assert speeds == {"seconds": 1.0, "tokens_per_second": 100.0, "samples_per_second": 10.0, "mfu": None}


def test_mfu_is_the_share_of_the_peak() -> None:
    cost = TrainingCost((PartCost(per_token=6.0, per_pair=2.0, per_source_pair=0.0, positions=None),))
    meter = Meter(10, cost, peak=100.0)
    meter.add(report_of(1, seconds=4.0, tokens=10, samples=2))
    assert meter.speeds()["mfu"] == pytest.approx((6 * 10 + 2 * 10 * 5) / 4 / 100)


def test_a_meter_that_has_seen_nothing_has_speeds() -> None:
    assert Meter(10).speeds()["tokens_per_second"] == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA L4", 121)],
)
def test_known_gpus_have_the_peak_of_their_data_sheet(
    name: str, teraflops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == teraflops * 1e12


def test_the_peak_of_a_cpu_is_measured() -> None:
    assert peak_flops(CPU, torch.float32) > 1e8
    assert measured_peak(CPU, torch.float64) > 1e8


def test_the_peak_of_memory_grows_with_what_is_held() -> None:
    before = peak_memory(CPU)
    held = torch.ones(1 << 26)  # 256 MiB
    after = peak_memory(CPU)
    assert before is not None
    assert after is not None
    assert after >= before > 0
    assert after >= held.numel() * 4
