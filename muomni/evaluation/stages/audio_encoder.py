"""Audio encoder: word and character error rates, and samples that CTC cannot align."""

from muomni.data.views.base import Batch
from muomni.evaluation.context import EvaluationContext
from muomni.evaluation.metrics.error_rates import ErrorCounts
from muomni.evaluation.metrics.sample_types import BatchTypes
from muomni.evaluation.report import Metric
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts
from muomni.models.speech.ctc import greedy_decode
from muomni.training.outputs import StageOutput
from muomni.training.stages.audio_encoder import AudioEncoderStage, AudioEncoderTask
from muomni.training.validation import validate


def evaluate(context: EvaluationContext) -> list[Metric]:
    """WER and CER of greedy CTC decoding, WER with the training word list, infeasible samples.

    WERs also by type of sample. The baseline is the best constant transcript.
    """
    stage, task = context.stage, context.task
    assert isinstance(stage, AudioEncoderStage) and isinstance(task, AudioEncoderTask)
    transcripts = TrainingTranscripts(context)
    view = stage.view()
    decoder = transcripts.word_decoder(view.units)
    errors = ErrorCounts(transcripts.constants())
    batches = BatchTypes(context.batches(), context.source, view)

    def forward(batch: Batch) -> StageOutput:
        logits, frame_lengths = task.logits(batch)
        decoded = [[]] * len(logits) if decoder is None else decoder.decode(logits, frame_lengths)
        greedy = greedy_decode(logits, frame_lengths)
        labels, lengths = batch["labels"].cpu(), batch["label_lengths"].cpu()
        types = batches.current(int((lengths > 0).sum()))
        for row, type in enumerate(types):
            hypotheses = {
                "greedy": stage.tokenizer.decode(greedy[row]),
                "words": " ".join(decoded[row]),
            }
            reference = stage.tokenizer.decode(labels[row, : lengths[row]].tolist())
            errors.add(reference, type, **hypotheses)
        return task.score(batch, logits, frame_lengths)

    metrics = validate(stage, forward, batches)
    rates = errors.reduce()
    with_list = rates.metric("wer", "wer_with_word_list", rates.rate("wer", "words"))
    return [
        rates.metric("wer", "wer", metrics["wer"]),
        *([] if decoder is None else [with_list]),
        rates.metric("cer", "cer", metrics["cer"]),
        Metric("infeasible_fraction", metrics["infeasible_fraction"]),
        *rates.metrics_by_type("wer", "wer", "greedy"),
        *([] if decoder is None else rates.metrics_by_type("wer", "wer_with_word_list", "words")),
    ]
