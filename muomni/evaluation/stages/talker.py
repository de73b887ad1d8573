"""Metrics of the Talker: the next code when the true ones are known, and the speech that it makes
from text alone.
"""

import torch

from muomni.config.models import FRAME_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.views.base import Batch
from muomni.data.views.tts import pad_characters
from muomni.evaluation.context import Subject
from muomni.evaluation.metrics.codes import CodeCounts
from muomni.evaluation.metrics.tally import Tally, ratio, watch
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.spoken import MAX_SPOKEN_SAMPLES, SpeechErrors, audio_clips
from muomni.models.speech.speech_output import speak
from muomni.models.speech.talker import Talker
from muomni.training.stages.talker import TalkerStage
from muomni.training.validation import validate

# Free-run speech is cut at this multiple of the original's duration, and a second more.
_MAX_STRETCH = 3


def evaluate(subject: Subject) -> list[Metric]:
    """Code and stop accuracy beside constant answers; WER and duration of free-run speech."""
    counts = CodeCounts(subject.model.config.codebook_size)
    tally = Tally()

    def look(batch: Batch) -> None:
        counts.add("test", batch)
        _add_stops(tally, subject.model, batch)

    accuracies = validate(subject.stage, subject.task, watch(subject.batches(), look))
    for _, batch in subject.train_batches():
        counts.add("train", batch)
    return [*counts.metrics(accuracies), _stop_metric(tally), *_free_run(subject)]


def _add_stops(tally: Tally, talker: Talker, batch: Batch) -> None:
    """Count right decisions to stop (once an audio clip) and to go on (once a frame)."""
    mask = batch["code_mask"]
    text = [batch[name] for name in ("text_ids", "character_ids", "text_mask")]
    output = talker(*text, batch["codes"], mask)
    says_stop = output.base.argmax(-1) == talker.stop
    lengths = mask.sum(1)
    is_real = lengths > 0
    stops = says_stop.gather(1, lengths[:, None])[:, 0] & is_real
    tally.add("stop", torch.stack([stops.sum(), is_real.sum()]))
    tally.add("go_on", torch.stack([(~says_stop[:, :-1] & mask).sum(), mask.sum()]))


def _stop_metric(tally: Tally) -> Metric:
    """The mean of both shares, so that a Talker that never stops gets one half."""
    sums = tally.reduce()
    value = (ratio(sums["stop"]) + ratio(sums["go_on"])) / 2
    name = "stop_balanced_accuracy"
    return Metric(name, value, (0.0 + 1.0) / 2, "never stops", is_lower_better=False)


def _free_run(subject: Subject) -> list[Metric]:
    """Speech from text alone: errors of our recognition, duration, and how often it stops."""
    errors, tally = SpeechErrors(subject), Tally()
    stage = subject.stage
    assert isinstance(stage, TalkerStage)
    tokenizer, codec = stage.tokenizer, stage.codec.codec
    for audio in audio_clips(subject, subject.source, min(subject.num_samples, MAX_SPOKEN_SAMPLES)):
        original_s = len(audio.waveform) / SAMPLE_RATE_HZ
        ids = tokenizer.encode(audio.text)
        text = pad_characters([(ids, tokenizer.characters(ids))], tokenizer.pad_id)
        speech = speak(
            subject.model,
            codec,
            *(text[name][0].to(subject.device) for name in ("text_ids", "character_ids")),
            max_frames=round((_MAX_STRETCH * original_s + 1) * FRAME_RATE_HZ),
        )
        tally.add("duration", torch.tensor([len(speech.waveform) / SAMPLE_RATE_HZ, original_s]))
        tally.add("stopped", torch.tensor([float(speech.stopped), 1.0]))
        errors.add(audio, speech.waveform)
    sums = tally.reduce()
    return [
        *errors.metrics("free_run_speech"),
        Metric("duration_ratio", ratio(sums.get("duration"))),
        Metric("stopped_fraction", ratio(sums.get("stopped")), is_lower_better=False),
    ]
