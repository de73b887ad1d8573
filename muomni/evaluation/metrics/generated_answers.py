"""Generate answers with the fine-tuned model, as `launch/generate.py` does, and score them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.data.media.decode import decode_audio
from muomni.data.text.turns import find_medium, read_turns
from muomni.errors import DataError
from muomni.evaluation.context import EvaluationContext, shard_indices
from muomni.evaluation.metrics.answer_tasks import (
    KINDS,
    AnswerTask,
    answer_tasks,
    frequent_answer,
    is_exact,
    token_f1,
)
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.metrics.sample_types import reported_types, sample_type
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.speech_errors import MAX_SPOKEN_SAMPLES, Audio, SpeechErrors
from muomni.inference.answer import Answer, Prompt, Question, answer_batch, encode_question
from muomni.inference.load import Assistant, load_assistant
from muomni.inference.speech import speak_answer

logger = logging.getLogger(__name__)

# Generation is slow, so only this many conversations are answered.
MAX_ANSWERED_SAMPLES = 2048
# Batches are formed within a buffer of questions sorted by length limit.
_BATCH_SIZE, _BUFFER_SIZE = 16, 128
# Limits of an answer: this many times the reference, plus some tokens or seconds of speech.
_MAX_STRETCH, _SPARE_TOKENS, _SPARE_S = 3, 16, 1.0
_F1_KINDS = ("caption", "spoken_question")


def score_generated_answers(context: EvaluationContext, constants: dict[str, str]) -> list[Metric]:
    """Exact match by type or kind, word F1 of image answers, and error rates of transcripts and speech.

    `constants` has the most frequent training answer by type and kind, the baseline. Appends the answers to
    `context.answers`. A collective.
    """
    assistant = load_assistant(context.request.run, context.device)
    scores = _Scores(
        constants,
        ErrorCounts(_with_empty(constants.get("transcribe"))),
        SpeechErrors(context, _with_empty(constants.get("speak"))),
    )
    spoken = _spoken_samples(context)
    for query, answer in _generate(assistant, _queries(context, assistant)):
        scores.add_text(query.task, answer.text)
        context.answers.append(_record(query, answer))
        if query.task.audio is None or query.index not in spoken:
            continue
        try:
            _add_speech(scores.speech, assistant, query, answer)
        except DataError as error:
            logger.warning("not transcribed: %s: %s", context.source.describe(query.index), error)
    return scores.metrics()


@dataclass(slots=True)
class _Scores:
    """Sums over this rank's answers."""

    constants: dict[str, str]
    transcripts: ErrorCounts
    speech: SpeechErrors
    tally: Tally = field(default_factory=Tally)

    def add_text(self, task: AnswerTask, answer: str) -> None:
        """Add the scores of an answer and of the constant: [model, constant, number of answers]."""
        constant = frequent_answer(self.constants, task)
        pair = (answer.strip(), constant)
        exact = [float(is_exact(task, text)) for text in pair]
        for name in ("exact_match", f"exact_match.{task.label}"):
            self.tally.add(name, torch.tensor([*exact, 1.0]))
        self.tally.add(task.kind, 1)
        if task.kind in _F1_KINDS:
            scores = [token_f1(task.text, text) for text in pair]
            self.tally.add(f"token_f1.{task.kind}", torch.tensor([*scores, 1.0]))
        if task.kind == "transcribe":
            self.transcripts.add(task.text, task.type, answer=answer)

    def metrics(self) -> list[Metric]:
        """Return the metrics over all ranks; a collective."""
        sums = self.tally.reduce()
        labels = {name.partition(".")[2] for name in sums if name.startswith("exact_match.")}
        types = reported_types(labels - set(KINDS))
        named = [*(kind for kind in KINDS if kind in labels), *types]
        metrics = []
        for name in (
            "exact_match",
            *(f"exact_match.{label}" for label in named),
            *(f"token_f1.{kind}" for kind in _F1_KINDS),
        ):
            if name in sums:
                model, constant, weight = sums[name]
                values = ratio(torch.stack([model, weight])), ratio(torch.stack([constant, weight]))
                metrics.append(
                    Metric(name, *values, "most frequent training answer", is_lower_better=False)
                )
        rates = self.transcripts.reduce()
        if "transcribe" in sums:
            for kind in ("wer", "cer"):
                value = rates.rate(kind, "answer")
                metrics.append(rates.metric(kind, f"{kind}.transcribe", value))
            metrics += rates.metrics_by_type("wer", "wer", "answer")
        spoken = self.speech.metrics("spoken_answers")
        return metrics + (spoken if "speak" in sums else [])


@dataclass(frozen=True, slots=True)
class _Query:
    """One answer to generate: its sample in the split, task, and prompt."""

    index: int
    sample: dict[str, bytes]
    task: AnswerTask
    prompt: Prompt


def _record(query: _Query, answer: Answer) -> dict[str, Any]:
    """An answer and its reference, for the report."""
    task, text = query.task, answer.text.strip()
    return {
        "index": query.index,
        "key": query.sample["__key__"],
        "turn": len(task.history),
        "kind": task.kind,
        "type": task.type,
        "reference": task.text,
        "answer": text,
        "is_exact": is_exact(task, text),
    }


def _spoken_samples(context: EvaluationContext) -> set[int]:
    """The first `MAX_SPOKEN_SAMPLES` samples with a spoken answer; the same on every rank."""

    def is_spoken(index: int) -> bool:
        try:
            turns = read_turns(context.source.read(index))
        except DataError:
            return False  # logged by _queries
        return any(task.audio is not None for task in answer_tasks(turns))

    indices = range(min(context.num_samples, MAX_ANSWERED_SAMPLES))
    return set(islice(filter(is_spoken, indices), MAX_SPOKEN_SAMPLES))


def _queries(context: EvaluationContext, assistant: Assistant) -> Iterator[_Query]:
    """Yield the answers to generate of this rank's shard; broken samples are logged and skipped."""
    indices = shard_indices(min(context.num_samples, MAX_ANSWERED_SAMPLES))
    for index in context.counted(indices, len(indices), f"{context.source.split} answers"):
        sample = context.source.read(index)
        try:
            for task in answer_tasks(read_turns(sample), sample_type(sample)):
                num_tokens = len(assistant.tokenizer.encode(task.text))
                limit = _MAX_STRETCH * num_tokens + _SPARE_TOKENS
                prompt = encode_question(assistant, Question(task.history, sample), limit)
                yield _Query(index, sample, task, prompt)
        except DataError as error:
            logger.warning("not answered: %s: %s", context.source.describe(index), error)


def _generate(assistant: Assistant, queries: Iterator[_Query]) -> Iterator[tuple[_Query, Answer]]:
    """Answer in batches of similar length limits."""
    while buffer := list(islice(queries, _BUFFER_SIZE)):
        buffer.sort(key=lambda query: query.prompt.max_new_tokens)
        for start in range(0, len(buffer), _BATCH_SIZE):
            batch = buffer[start : start + _BATCH_SIZE]
            answers = answer_batch(assistant, [query.prompt for query in batch])
            yield from zip(batch, answers, strict=True)


def _add_speech(errors: SpeechErrors, assistant: Assistant, query: _Query, answer: Answer) -> None:
    """Speak the generated answer and count its errors; an answer that fails to speak is silence."""
    name = query.task.audio
    assert name is not None
    original = torch.from_numpy(decode_audio(find_medium(query.sample, name)))
    audio = Audio(query.index, original.to(assistant.device), query.task.text)
    max_s = _MAX_STRETCH * len(original) / SAMPLE_RATE_HZ + _SPARE_S
    try:
        waveform = speak_answer(assistant, answer, max_seconds=max_s).waveform
    except DataError:
        waveform = original.new_zeros(0)
    errors.add(audio, waveform)


def _with_empty(constant: str | None) -> tuple[str, ...]:
    return ("",) if not constant else ("", constant)
