"""Codec: reconstruction error, codebook usage, and intelligibility of decoded speech.

Full audio clips pass through encoder, quantizer, decoder, and vocoder one at a time, as in inference;
training uses crops.
"""

import torch
from torch import Tensor

from muomni.evaluation.context import EvaluationContext, shard_indices
from muomni.evaluation.metrics.baselines import count_codes
from muomni.evaluation.metrics.tally import Tally, ratio
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.speech_errors import SpeechErrors, audio_clips
from muomni.models.speech.codec import Codec, mean_mel_l1
from muomni.models.speech.quantizer import code_perplexity
from muomni.models.speech.vocoder import mel_to_waveform

# The mean spectrum is fitted on this many audio clips.
_MAX_TRAIN_AUDIO_CLIPS = 2_000


def evaluate(context: EvaluationContext) -> list[Metric]:
    """Mel L1 in natural-log units (baseline: the training mean), codebook usage, WER of decoded speech."""
    codec: Codec = context.model
    mean_mel = _mean_mel(context, codec)
    errors = SpeechErrors(context)
    tally = Tally()
    context.num_bad = len(shard_indices(context.num_samples))
    for audio in audio_clips(context, context.source, context.num_samples):
        context.num_bad -= 1
        target, lengths, codes = _spectrum_and_codes(codec, audio.waveform)
        mel = codec.decode(codes)[:, : target.shape[1]]
        tally.add("mel_l1", _l1(mel, target))
        if mean_mel is not None:
            tally.add("mean_mel_l1", mean_mel_l1(target, lengths, mean_mel))
        tally.add("codes", count_codes(codes, codec.config.codebook_size))
        if audio.is_spoken:
            errors.add(audio, mel_to_waveform(mel[0], codec.config.mel))
    sums = tally.reduce()
    baseline = None if mean_mel is None else ratio(sums.get("mean_mel_l1"))
    metrics = [Metric("mel_l1", ratio(sums.get("mel_l1")), baseline, "mean mel of training")]
    counts = sums.get("codes", torch.zeros(codec.config.num_codebooks, codec.config.codebook_size))
    used, perplexity = (counts > 0).double().mean(1), code_perplexity(counts)
    for k in range(codec.config.num_codebooks):
        metrics.append(Metric(f"code_use_fraction.{k}", float(used[k]), is_lower_better=False))
        metrics.append(Metric(f"code_perplexity.{k}", float(perplexity[k]), is_lower_better=False))
    return [*metrics, *errors.metrics("decoded_speech")]


def _mean_mel(context: EvaluationContext, codec: Codec) -> Tensor | None:
    """The mean log-mel spectrum [num_mels] of all training frames; a collective."""
    tally = Tally()
    if context.train is not None:
        for audio in audio_clips(context, context.train, _MAX_TRAIN_AUDIO_CLIPS):
            log_mel, lengths = _log_mel(codec, audio.waveform)
            tally.add("mel", log_mel[0].double().sum(0))
            tally.add("num_frames", lengths)
    sums = tally.reduce()
    if "mel" not in sums:
        return None
    return (sums["mel"] / sums["num_frames"]).float().to(context.device)


def _log_mel(codec: Codec, waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mel [1, T, num_mels] of a waveform [N], and T as a tensor [1]."""
    return codec.log_mel(waveform[None], torch.tensor([len(waveform)], device=waveform.device))


def _spectrum_and_codes(codec: Codec, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-mel [1, T, num_mels], lengths [1], and codes [1, frames, K] of a waveform [N]."""
    lengths = torch.tensor([len(waveform)], device=waveform.device)
    codes, _ = codec.encode(waveform[None], lengths)
    return *_log_mel(codec, waveform), codes


def _l1(mel: Tensor, target: Tensor) -> Tensor:
    """[sum over frames of the mean absolute error, num_frames] of log-mels [1, T, num_mels]."""
    error = (mel - target).abs().mean(-1)
    return torch.stack([error.sum(), torch.tensor(float(error.numel()), device=error.device)])
