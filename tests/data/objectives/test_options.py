"""What can be said of objectives, and what makes no sense."""

import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.data.objectives.options import ObjectiveOptions


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mask_probability": 0.0}, "mask_probability=0.0 must be between 0 and 1"),
        ({"mask_probability": float("nan")}, "mask_probability=nan must be"),
        ({"mask_kept": 0.6, "mask_random": 0.5}, "mask_kept=0.6 and mask_random=0.5 must be shares"),
        ({"infilling_long": -0.1}, "infilling_long=-0.1 and infilling_sentences=0.0 must be shares"),
        ({"mean_span_length": 0.5}, "mean_span_length=0.5 must be at least 1"),
        ({"sentinels": "<extra>"}, "sentinels='<extra>' must hold {}"),
        ({"sentinels": "<{0}>"}, "sentinels='<{0}>' must hold {}"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float | str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectiveOptions.from_dict(options)
    assert problem in str(caught.value)
