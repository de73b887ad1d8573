"""Talker: accuracy of the next code under teacher forcing, and quality of speech generated from text."""

import torch

from muomni.config.models import FRAME_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.views.base import Batch
from muomni.data.views.characters import pad_spelled
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.baselines import CodeCounts
from muomni.evaluation.metrics.tally import Tally, ratio, watch
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.speech_errors import MAX_SPOKEN_SAMPLES, SpeechErrors, audio_clips
from muomni.models.speech.speech_output import speak
from muomni.models.speech.talker import Talker
from muomni.training.stages.talker import TalkerStage
from muomni.training.validation import validate

# Generated speech is at most this multiple of the original duration plus one second.
_MAX_STRETCH = 3


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Code and stop accuracy (baseline: constant predictions), WER and duration of generated speech."""
    counts = CodeCounts(context.model.config.codebook_size)
    tally = Tally()

    def observe(batch: Batch) -> None:
        counts.add("test", batch)
        _add_stops(tally, context.model, batch)

    accuracies = validate(context.stage, context.task, watch(context.batches(), observe))
    for _, batch in context.train_batches():
        counts.add("train", batch)
    return [*counts.metrics(accuracies), _stop_metric(tally), *_free_run(context)]


def _add_stops(tally: Tally, talker: Talker, batch: Batch) -> None:
    """Count correct decisions to stop (one per audio clip) and to continue (one per frame)."""
    mask = batch["code_mask"]
    text = [batch[name] for name in ("text_ids", "character_ids", "text_mask")]
    output = talker(*text, batch["codes"], mask)
    predicts_stop = output.base.argmax(-1) == talker.stop
    lengths = mask.sum(1)
    is_real = lengths > 0
    stops = predicts_stop.gather(1, lengths[:, None])[:, 0] & is_real
    tally.add("stop", torch.stack([stops.sum(), is_real.sum()]))
    tally.add("continue", torch.stack([(~predicts_stop[:, :-1] & mask).sum(), mask.sum()]))


def _stop_metric(tally: Tally) -> Metric:
    """The mean of both accuracies: 0.5 for a Talker that never stops."""
    sums = tally.reduce()
    value = (ratio(sums["stop"]) + ratio(sums["continue"])) / 2
    name = "stop_balanced_accuracy"
    return Metric(name, value, (0.0 + 1.0) / 2, "never stops", is_lower_better=False)


def _free_run(context: EvaluationContext) -> list[Metric]:
    """Speech generated from text: error rates, duration ratio, and fraction that stops by itself."""
    errors, tally = SpeechErrors(context), Tally()
    stage = context.stage
    assert isinstance(stage, TalkerStage)
    tokenizer, codec = stage.tokenizer, stage.codec.codec
    for audio in audio_clips(context, context.source, min(context.num_samples, MAX_SPOKEN_SAMPLES)):
        original_s = len(audio.waveform) / SAMPLE_RATE_HZ
        ids = tokenizer.encode(audio.text)
        spelled = pad_spelled([(ids, tokenizer.spell(ids))], tokenizer.pad_id)
        speech = speak(
            context.model,
            codec,
            *(spelled[name][0].to(context.device) for name in ("text_ids", "character_ids")),
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
