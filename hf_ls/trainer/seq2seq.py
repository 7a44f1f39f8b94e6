"""Encoder-decoder models: generation and calibration in one evaluation.

Text metrics are the user's `compute_metrics`; here are the confidence of a generated sequence and what equals its labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainingArguments
from transformers.modeling_utils import unwrap_model
from transformers.trainer_utils import EvalLoopOutput

from hf_ls.common.models import IGNORE_INDEX
from hf_ls.losses.cross_entropy import logits_of
from hf_ls.metrics.streaming import StreamingCalibration
from hf_ls.trainer.arguments import LabelSmoothingSeq2SeqArguments
from hf_ls.trainer.batch import copied
from hf_ls.trainer.evaluation import item_statistics
from hf_ls.trainer.mixin import LabelSmoothingMixin


class LabelSmoothingSeq2SeqTrainer(LabelSmoothingMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with label smoothing done right; see `LabelSmoothingMixin`.

    Under `predict_with_generate` one evaluation gives both: a teacher-forced pass for the unsmoothed `nll`, `ece` and so on
    of the label tokens, and generated token ids as predictions, padded as the stock class pads them, for `compute_metrics`.
    It also reports `exact_match`, the share of generated sequences equal to their labels (padding and the tokens which start
    and end a sequence aside), and `sequence_ece`, the ECE of exp(Σ log p) of each generated sequence as confidence that it is.
    Log-probabilities are the model's, without the beams and processors of generation. An example which was repeated to fill
    the last batch counts once, also in `compute_metrics`.

    Attributes:
        sequence_calibration: the sums of the last evaluation which generated: confidence and correctness as above, nll of
            the label sequence in nats, brier = (confidence − correct)², 0 to 1. None before.

    Raises: ValueError for `predict_with_generate` with a model which is no encoder-decoder; TypeError for arguments which are
    no `Seq2SeqTrainingArguments`.
    """

    _arguments_class: type[TrainingArguments] = LabelSmoothingSeq2SeqArguments
    sequence_calibration: StreamingCalibration | None = None
    _sequences: StreamingCalibration | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, TrainingArguments)), None)
        if given is not None and not hasattr(given, "predict_with_generate"):
            raise TypeError(f"expected Seq2SeqTrainingArguments, got {type(given).__name__}; use LabelSmoothingSeq2SeqArguments")
        super().__init__(*args, **kwargs)
        if self.args.predict_with_generate and not getattr(self.model.config, "is_encoder_decoder", False):  # type: ignore[attr-defined]
            raise ValueError(
                f"expected an encoder-decoder model with predict_with_generate, got {type(unwrap_model(self.model)).__name__}, "
                "whose inputs hold the labels; evaluate it without generation"
            )

    def _generates(self, prediction_loss_only: bool | None) -> bool:
        # A plain evaluate() asks for the loss only where there is no compute_metrics; exact_match needs none.
        wanted = not prediction_loss_only or self.compute_metrics is None
        return self.args.predict_with_generate and not self.args.prediction_loss_only and self._fit is None and wanted  # type: ignore[attr-defined]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `LabelSmoothingMixin.evaluation_loop`, with `exact_match` and `sequence_ece` where it generates."""
        self._sequences = StreamingCalibration() if self._generates(prediction_loss_only) else None
        loss_only = False if self._sequences is not None else prediction_loss_only
        output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
        sequences, self._sequences = self._sequences, None
        if sequences is not None and len(sequences) and output.metrics is not None:
            self.sequence_calibration = sequences
            found = sequences.compute()
            output.metrics.setdefault(f"{metric_key_prefix}_exact_match", found["accuracy"])
            output.metrics.setdefault(f"{metric_key_prefix}_sequence_ece", found["ece"])
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """As `Seq2SeqTrainer.prediction_step`, whose loss is ours also where it generates."""
        if not self.args.predict_with_generate:  # type: ignore[attr-defined]
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if prediction_loss_only or not self._generates(False):
            return super().prediction_step(model, inputs, True, *args, **kwargs)

        def teacher_forced(**batch: Any) -> dict[str, Tensor]:
            # The stock class calls the model only for its loss, smoothed or not as the model likes.
            return {"loss": self.compute_loss(model, batch)}

        result = super().prediction_step(teacher_forced, copied(inputs), False, *args, **kwargs)
        pending = None if self._evaluation is None else self._evaluation.pending
        if self._sequences is not None and pending is not None:
            self._keep_sequences(model, self._prepare_inputs(inputs), torch.as_tensor(result[1]), *pending)
        return result

    @torch.no_grad()
    def _keep_sequences(self, model: nn.Module, inputs: dict[str, Any], generated: Tensor, items: Tensor, labels: Tensor) -> None:
        """Confidence, correctness and label NLL of each sequence of a batch, from one more teacher-forced pass."""
        generated = generated[:: len(generated) // len(labels)]  # the first of several return sequences
        tokens = self._written(generated)
        width = int((tokens != IGNORE_INDEX).any(0).nonzero().max()) + 1 if bool((tokens != IGNORE_INDEX).any()) else 1
        batch = {name: value for name, value in self._read(inputs).for_model(model).items() if not name.startswith("decoder_")}
        with self.compute_loss_context_manager():
            logits = logits_of(model(**batch, decoder_input_ids=generated[:, :width]))
        found = item_statistics(logits, tokens[:, :width], temperature=self.temperature)
        confidence = found[..., 2].nansum(1).neg().exp()
        ignored = self._bare_tokens()
        correct = [
            _without(row, ignored) == _without(label, ignored)
            for row, label in zip(tokens.tolist(), labels.tolist(), strict=True)
        ]
        rows = torch.stack([confidence, confidence.new_tensor(correct), items[..., 2].nansum(1)], 1)
        rows[(labels == IGNORE_INDEX).all(1)] = float("nan")  # nothing to compare with
        sequences = self._gather_once(rows).cpu().numpy()
        confidence, right, nll = sequences[~(sequences != sequences).any(1)].T
        if self._sequences is not None:
            self._sequences.update(confidence, right.astype(bool), nll, (confidence - right) ** 2)

    def _written(self, generated: Tensor) -> Tensor:
        """Generated ids [B, L] after the first, up to the end of each sequence and with it; ignored beyond."""
        tokens = generated[:, 1:]
        ends = torch.isin(tokens, tokens.new_tensor(sorted(self._ids("eos_token_id"))))
        padding = torch.isin(tokens, tokens.new_tensor(sorted(self._ids("pad_token_id"))))
        beyond = (ends.cumsum(1) - ends.long() > 0) | (padding & ~ends)
        return tokens.masked_fill(beyond, IGNORE_INDEX)

    def _bare_tokens(self) -> set[int]:
        """The ids which do not count in a comparison: padding, start and end."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        return {IGNORE_INDEX}.union(*(self._ids(name) for name in names))

    def _ids(self, name: str) -> set[int]:
        config = self.model.config
        sources = (self.model.generation_config, config, config.get_text_config(decoder=True), self.processing_class)
        found = [getattr(source, name, None) for source in sources]
        return {int(i) for value in found if value is not None for i in (value if isinstance(value, list | tuple) else [value])}


def _without(ids: list[int], ignored: set[int]) -> list[int]:
    return [token for token in ids if token not in ignored]
