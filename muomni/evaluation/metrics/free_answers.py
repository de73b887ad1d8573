"""Answers that the fine-tuned model gives by itself, through the code that `launch/generate.py` uses."""

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
from muomni.evaluation.context import Subject, rank_share
from muomni.evaluation.metrics.answers import KINDS, AnswerTask, answer_tasks, is_exact, token_f1
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.metrics.transcripts import TranscriptErrors
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.spoken import MAX_SPOKEN_SAMPLES, Audio, SpeechErrors
from muomni.inference.answer import Answer, Prompt, Question, answer_together, encode_question
from muomni.inference.load import Assistant, load_assistant
from muomni.inference.speech import speak_answer

logger = logging.getLogger(__name__)

# Generation takes its time: so many conversations are answered.
MAX_ANSWERED_SAMPLES = 2048
# Questions answered at a time, and those among which they are chosen.
_BATCH_SIZE, _WINDOW = 16, 128
# An answer may be this much longer than the right one, in tokens; speech in seconds.
_MAX_STRETCH, _SPARE_TOKENS, _SPARE_S = 3, 16, 1.0
_F1_KINDS = ("caption", "spoken_question")


@dataclass(slots=True)
class _Scores:
    """Sums over this rank's answers."""

    constants: dict[str, str]
    transcripts: TranscriptErrors
    speech: SpeechErrors
    tally: Tally = field(default_factory=Tally)

    def add_text(self, task: AnswerTask, given: str) -> None:
        """Score an answer and the constant answer of its kind: [model, constant, answers]."""
        constant = self.constants.get(task.kind, "")
        pair = (given.strip(), constant)
        exact = [float(is_exact(task, text)) for text in pair]
        for name in ("exact_match", f"exact_match.{task.kind}"):
            self.tally.add(name, torch.tensor([*exact, 1.0]))
        if task.kind in _F1_KINDS:
            scores = [token_f1(task.text, text) for text in pair]
            self.tally.add(f"token_f1.{task.kind}", torch.tensor([*scores, 1.0]))
        if task.kind == "transcribe":
            self.transcripts.add(task.text, given=given)

    def metrics(self) -> list[Metric]:
        """Every rank must call it."""
        sums = self.tally.reduce()
        kinds = [f"exact_match.{kind}" for kind in KINDS] + [f"token_f1.{k}" for k in _F1_KINDS]
        metrics = []
        for name in ("exact_match", *kinds):
            if name in sums:
                model, constant, weight = sums[name]
                values = ratio(torch.stack([model, weight])), ratio(torch.stack([constant, weight]))
                metrics.append(
                    Metric(name, *values, "most frequent training answer", is_lower_better=False)
                )
        rates = self.transcripts.reduce()
        if "exact_match.transcribe" in sums:
            for kind in ("wer", "cer"):
                value = rates.rate(kind, "given")
                metrics.append(rates.metric(kind, f"{kind}.transcribe", value))
        spoken = self.speech.metrics("spoken_answers")
        return metrics + (spoken if "exact_match.speak" in sums else [])


def free_answers(subject: Subject, constants: dict[str, str]) -> list[Metric]:
    """Exact match by kind, word F1 of what is said of images, errors of transcripts and speech.

    `constants` holds the most frequent training answer of each kind. What was answered is kept in
    `subject.answers`. Every rank must call it.
    """
    assistant = load_assistant(subject.wanted.run, subject.device)
    scores = _Scores(
        constants,
        TranscriptErrors(_with_empty(constants.get("transcribe"))),
        SpeechErrors(subject, _with_empty(constants.get("speak"))),
    )
    spoken = _spoken_samples(subject)
    for asked, made in _answered(assistant, _questions(subject, assistant)):
        scores.add_text(asked.task, made.text)
        subject.answers.append(_record(asked, made))
        if asked.task.audio is None or asked.index not in spoken:
            continue
        try:
            _add_speech(scores.speech, assistant, asked, made)
        except DataError as error:
            logger.warning("not heard: %s: %s", subject.source.describe(asked.index), error)
    return scores.metrics()


@dataclass(frozen=True, slots=True)
class _Asked:
    """One answer that is wanted: of which sample of the split, and the question before it."""

    index: int
    sample: dict[str, bytes]
    task: AnswerTask
    prompt: Prompt


def _record(asked: _Asked, made: Answer) -> dict[str, Any]:
    """An answer beside the right one, for a reader."""
    task, answer = asked.task, made.text.strip()
    return {
        "index": asked.index,
        "key": asked.sample["__key__"],
        "turn": len(task.history),
        "kind": task.kind,
        "reference": task.text,
        "answer": answer,
        "is_exact": is_exact(task, answer),
    }


def _spoken_samples(subject: Subject) -> set[int]:
    """The first samples with a spoken answer, as many as are made audible: the same on every rank."""

    def is_spoken(index: int) -> bool:
        try:
            turns = read_turns(subject.source.read(index))
        except DataError:
            return False  # named when it is to be answered
        return any(task.audio is not None for task in answer_tasks(turns))

    indices = range(min(subject.num_samples, MAX_ANSWERED_SAMPLES))
    return set(islice(filter(is_spoken, indices), MAX_SPOKEN_SAMPLES))


def _questions(subject: Subject, assistant: Assistant) -> Iterator[_Asked]:
    """The questions of this rank's share of conversations; broken ones are left out and named."""
    for index in rank_share(min(subject.num_samples, MAX_ANSWERED_SAMPLES)):
        sample = subject.source.read(index)
        try:
            for task in answer_tasks(read_turns(sample)):
                num_tokens = len(assistant.tokenizer.encode(task.text))
                limit = _MAX_STRETCH * num_tokens + _SPARE_TOKENS
                prompt = encode_question(assistant, Question(task.history, sample), limit)
                yield _Asked(index, sample, task, prompt)
        except DataError as error:
            logger.warning("not answered: %s: %s", subject.source.describe(index), error)


def _answered(assistant: Assistant, questions: Iterator[_Asked]) -> Iterator[tuple[_Asked, Answer]]:
    """Answer in batches, each of questions out of a window whose answers may become about as long."""
    while window := list(islice(questions, _WINDOW)):
        window.sort(key=lambda asked: asked.prompt.max_new_tokens)
        for start in range(0, len(window), _BATCH_SIZE):
            batch = window[start : start + _BATCH_SIZE]
            made = answer_together(assistant, [asked.prompt for asked in batch])
            yield from zip(batch, made, strict=True)


def _add_speech(errors: SpeechErrors, assistant: Assistant, asked: _Asked, made: Answer) -> None:
    """Speak the model's own answer; one that it cannot speak is silence."""
    name = asked.task.audio
    assert name is not None
    original = torch.from_numpy(decode_audio(find_medium(asked.sample, name)))
    audio = Audio(asked.index, original.to(assistant.device), asked.task.text)
    max_s = _MAX_STRETCH * len(original) / SAMPLE_RATE_HZ + _SPARE_S
    try:
        waveform = speak_answer(assistant, made, max_seconds=max_s).waveform
    except DataError:
        waveform = original.new_zeros(0)
    errors.add(audio, waveform)


def _with_empty(constant: str | None) -> tuple[str, ...]:
    return ("",) if not constant else ("", constant)
