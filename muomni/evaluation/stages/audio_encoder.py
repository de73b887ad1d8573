"""Audio encoder: word and character error rates, and samples that CTC cannot align."""

from muomni.data.views.base import Batch
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts
from muomni.training.outputs import StageOutput
from muomni.training.stages.audio_encoder import AudioEncoderStage, AudioEncoderTask
from muomni.training.validation import validate


def evaluate(context: EvaluationContext) -> list[Metric]:
    """WER and CER of greedy CTC decoding, WER with the training word list, infeasible samples.

    The baseline is the best constant transcript.
    """
    stage, task = context.stage, context.task
    assert isinstance(stage, AudioEncoderStage) and isinstance(task, AudioEncoderTask)
    transcripts = TrainingTranscripts(context)
    decoder = transcripts.word_decoder(stage.view().units)
    errors = ErrorCounts(transcripts.constants())

    def forward(batch: Batch) -> StageOutput:
        logits, frame_lengths = task.logits(batch)
        decoded = [[]] * len(logits) if decoder is None else decoder.decode(logits, frame_lengths)
        labels = zip(batch["labels"].cpu(), batch["label_lengths"].cpu(), strict=True)
        for (ids, length), words in zip(labels, decoded, strict=True):
            errors.add(stage.tokenizer.decode(ids[:length].tolist()), words=" ".join(words))
        return task.score(batch, logits, frame_lengths)

    metrics = validate(stage, forward, context.batches())
    rates = errors.reduce()
    with_list = rates.metric("wer", "wer_with_word_list", rates.rate("wer", "words"))
    return [
        rates.metric("wer", "wer", metrics["wer"]),
        *([] if decoder is None else [with_list]),
        rates.metric("cer", "cer", metrics["cer"]),
        Metric("infeasible_fraction", metrics["infeasible_fraction"]),
    ]
