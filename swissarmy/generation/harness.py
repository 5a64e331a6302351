"""`HarnessModel`: a model as EleutherAI's lm-evaluation-harness asks for one, so that its tasks run on it.

    import lm_eval
    from swissarmy.generation.harness import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=["arc_easy"])

How texts become tokens, what is cut off and what a long text is scored in follow the harness's own `HFLM`, so that
numbers compare with published ones; what differs is the work: contexts that answers share are read once.
Importing this module needs the extra `eval`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, final

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import ConfigError, HookCallError, TokenizerError, nearest, require_extra
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.generation.chat import turn_ends
from swissarmy.generation.continuations import score_continuations
from swissarmy.generation.progress import bar
from swissarmy.generation.strategies import GreedyStrategy, SamplingStrategy, Strategy
from swissarmy.generation.target_scores import check_predicts
from swissarmy.generation.text import generate

require_extra("lm_eval", extra="eval", purpose="evaluation on tasks")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

SHAPING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Settings of a task that say how tokens are drawn."""
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size")
"""Settings that hold for the likeliest token too."""

T = TypeVar("T")


class _Request(NamedTuple):
    """A continuation to be scored: its place among all, and tokens that fit the model."""

    place: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]


@final
class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A causal model with its tokenizer, for `lm_eval.simple_evaluate`.

    `num_truncated` counts the requests whose beginning was cut off because they are longer than `max_length`.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        """Wrap a model, in evaluation mode.

        Args:
            model: A causal model.
            tokenizer: Its tokenizer.
            batch_size: How many requests are worked on at a time; changes no result beyond rounding.
            max_length: How many tokens the model reads at most; its own maximum when omitted.
            max_new_tokens: How long an answer gets where the task does not say.
            seed: For tasks that draw their answers.
            progress: Show bars on standard error, if that is a terminal.

        Raises:
            HookCallError: The model is no causal language model.
            ConfigError: A number outside its range.
        """
        super().__init__()
        if not isinstance(model, BaseModel):
            raise HookCallError("tasks are run on causal models; this one answers a source text.")
        check_predicts(model)
        longest = model.config.max_sequence_length
        self.model, self.tokenizer, self.batch_size, self.max_new_tokens = model, tokenizer, batch_size, max_new_tokens
        self.max_length, self.seed, self.progress = longest if max_length is None else max_length, seed, progress
        for name, value, most in (
            ("batch_size", batch_size, None),
            ("max_length", self.max_length, longest),
            ("max_new_tokens", max_new_tokens, None),
        ):
            if value < 1 or (most is not None and value > most):
                raise ConfigError(f"{name}={value} must be at least 1{'' if most is None else f' and at most {most}'}.")
        self.num_truncated = 0
        self._device = model.device
        ends = (*tokenizer.eos_token_ids, *(() if tokenizer.chat_template is None else turn_ends(tokenizer)))
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))

    # Tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            TokenizerError: The tokenizer has none.
        """
        if not self.eos_token_ids:
            raise TokenizerError(
                "tasks need a token that a text begins with or ends with, and this tokenizer has none."
            )
        first: int = self.eos_token_ids[0]
        return first

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the begin token, or else the end token."""
        begin = self.tokenizer.bos_token_id
        return int(self.eot_token_id if begin is None else begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids; with the model's special tokens unless the text has a begin token itself, as chat templates give one."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    # Likelihood

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For pairs of context and continuation the log-probability, and whether greedy decoding would give it."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts; long ones in windows that do not overlap but for the last."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            owners += [place] * len(own)
        totals = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score tokens after tokens; those that share a context stand together, the longest first."""
        fitted = [self._fitted(place, *pair) for place, (_, *pair) in enumerate(requests)]
        fitted.sort(key=lambda each: (-len(each.context), each.context))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in self._batches(fitted, "scoring"):
            contexts, continuations = [each.context for each in batch], [each.continuation for each in batch]
            for each, score in zip(batch, score_continuations(self.model, contexts, continuations), strict=True):
                results[each.place] = (score.logprob, score.is_greedy)
                text = requests[each.place][0]
                if text is not None:  # windows of one text are remembered together, by their caller
                    self.cache_hook.add_partial("loglikelihood", text, results[each.place])
        return results

    def _fitted(self, place: int, context: list[int], continuation: list[int]) -> _Request:
        """What the model can read: the last token of a continuation is only predicted."""
        if len(continuation) > self.max_length:
            raise HookCallError(
                f"a continuation has {len(continuation):,} tokens, and the model reads {self.max_length:,}: the task "
                "does not fit this model."
            )
        room = self.max_length + 1 - len(continuation)
        self.num_truncated += len(context) > room
        return _Request(place, tuple(context[-room:]), tuple(continuation))

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For pairs of context and settings the answer, up to a stop string, an end token or the most tokens."""
        texts = [""] * len(requests)
        for settings, places in self._by_settings(requests):
            places.sort(key=lambda place: -len(requests[place].args[0]))
            done = 0
            for batch in self._batches(places, "generating"):
                contexts = [requests[place].args[0] for place in batch]
                answers = self._answers(contexts, settings, seed=self.seed + done)
                for place, text in zip(batch, answers, strict=True):
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                done += len(batch)
        return texts

    def _by_settings(self, requests: Sequence[Any]) -> Iterator[tuple["_Settings", list[int]]]:
        """Where the requests stand that can be answered together."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        for places in groups.values():
            yield _Settings.of(requests[places[0]].args[1], self.max_new_tokens), places

    def _answers(self, contexts: Sequence[str], settings: "_Settings", *, seed: int) -> list[str]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"a task asks for {settings.max_new_tokens:,} new tokens, and the model reads {self.max_length:,} in "
                "all: nothing is left for the question."
            )
        return generate(
            self.model,
            _Prompts(self, room),
            contexts,
            max_new_tokens=settings.max_new_tokens,
            strategy=settings.strategy(seed),
            stop=settings.until,
        )

    # Chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` it ends with the last message, to be gone on with.

        Raises:
            TokenizerError: There is no chat template, or it refuses the conversation.
        """
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        before, last, _ = text.rpartition(chat_history[-1]["content"].strip())
        return before + last

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of rendered requests apart, which depend on the chat template."""
        template = (self.tokenizer.chat_template or "").encode()
        return f"swissarmy-{hashlib.sha256(template).hexdigest()[:16]}"

    def _batches(self, items: Sequence[T], label: str) -> Iterator[Sequence[T]]:
        """So many at a time; a bar shows how many are done."""
        with bar(len(items), shown=self.progress, label=label) as report:
            for start in range(0, len(items), self.batch_size):
                report(start)
                yield items[start : start + self.batch_size]


@final
class _Prompts:
    """The tokenizer as `generate` asks for it: prompts lose their beginning where there is no room for it."""

    def __init__(self, harness: HarnessModel, room: int) -> None:
        self.harness, self.room, self.eos_token_ids = harness, room, harness.eos_token_ids

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; what a text begins with, where there is none."""
        ids = self.harness.tok_encode(text) or [self.harness.prefix_token_id]
        self.harness.num_truncated += len(ids) > self.room
        return ids[-self.room :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        return self.harness.tokenizer.decode(ids)


class _Settings(NamedTuple):
    """How a task wants its answers."""

    until: tuple[str, ...]
    max_new_tokens: int
    draws: bool
    options: Mapping[str, Any]
    """For the strategy."""

    @classmethod
    def of(cls, values: Mapping[str, Any], max_new_tokens: int) -> "_Settings":
        """Read a task's `generation_kwargs`.

        Raises:
            ConfigError: It asks for what is not known here.
        """
        given = dict(normalize_gen_kwargs(values, max_new_tokens))
        until = tuple(text for text in given.pop("until") if text)
        most, draws = given.pop("max_gen_toks"), given.pop("do_sample") and given.get("temperature") != 0
        unknown = sorted(set(given) - {*SHAPING, *PENALTIES})
        if unknown:
            raise ConfigError(
                f"a task's generation_kwargs have '{unknown[0]}', which is not known here."
                f"{nearest(unknown[0], (*SHAPING, *PENALTIES))} Known are: until, max_gen_toks, do_sample, "
                f"{', '.join((*SHAPING, *PENALTIES))}."
            )
        options = {name: value for name, value in given.items() if draws or name in PENALTIES}
        return cls(until, most, draws, options)

    def strategy(self, seed: int) -> Strategy:
        """The strategy, for a batch whose first row draws with this seed."""
        return SamplingStrategy(seed=seed, **self.options) if self.draws else GreedyStrategy(**self.options)
