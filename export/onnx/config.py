"""The options of `llmc export --format onnx`. Importing this imports neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.export.gguf.config import GgufExportConfig
from llmc.options import Wrong, check, like, option

ONNX = "ONNX"  # the options' group in --help
EXPORTERS = ("builder", "transformers", "optimum")
DTYPES = ("fp32", "fp16", "int8", "w8a8")
LEVELS = ("auto", "0", "4")
INT4_FORMS = ("nbits", "qdq")
HEAD_BITS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class OnnxExportConfig:
    """The options of the ONNX exporters."""

    model: Path | str | None = like(GgufExportConfig, "model")
    out: Path | None = like(GgufExportConfig, "out")
    exporter: str = option(
        "builder", help="Exporter. builder writes for ONNX Runtime. transformers and optimum trace the model and write "
                        "float32 in ONNX's standard operators, for other runtimes. They need the extras 'trace' and "
                        "'optimum'.", choices=EXPORTERS, group=ONNX)
    dequantize: bool = option(
        False, help="Write the values of a quantized model as float32. Only with --exporter transformers or optimum.",
        group=ONNX)
    dtype: str | None = option(
        None, help="Type of a float model's matrices. int8 is rounded in blocks of 32. w8a8 has int8 weights with a scale "
                   "for each row and int8 inputs with a scale for each token; run `llmc transform --scaling smoothquant` "
                   "first. A quantized model keeps its codes and accepts no --dtype.",
        choices=DTYPES, group=ONNX, shown="fp16")
    accuracy_level: str = option(
        "auto", help="Activations of quantized matrices. 0 keeps them in float32. 4 rounds them to 8 bits in blocks, which "
                     "is faster. auto takes 4 if a measurement shows that it is faster and the KL divergence is small.",
        choices=LEVELS, group=ONNX)
    head_accuracy_level: str | None = option(
        None, help="--accuracy-level of the output matrix alone, if it has 4 or 8 bits.", choices=LEVELS, group=ONNX,
        shown="--accuracy-level; with auto the head is measured separately")
    int4: str = option(
        "nbits", help="Form of quantized matrices. nbits is ONNX Runtime's MatMulNBits. qdq is the standard operators "
                      "DequantizeLinear and MatMul.", choices=INT4_FORMS, group=ONNX)
    head_bits: int | None = option(
        None, help="Number of bits of embedding and output matrix.", choices=HEAD_BITS, group=ONNX,
        shown="the type of a preset if ONNX has it; else 8 for a quantized model, and 4 for an embedding apart from the "
              "head beside 4 bits; else --dtype")
    chat_template: str = like(GgufExportConfig, "chat_template")
    threads: int | None = like(GgufExportConfig, "threads")
    dry_run: bool = like(GgufExportConfig, "dry_run")

    def __post_init__(self) -> None:
        check(self, "export", self._contradictions(), Wrong.out_of_range)

    def _contradictions(self) -> list[str]:
        """The given options that the chosen exporter or form does not have."""
        if self.exporter == "builder":
            given = {"--dequantize with --exporter builder, which keeps the codes": self.dequantize,
                     "--head-accuracy-level with --int4 qdq, which has one level for all matrices":
                         self.int4 == "qdq" and self.head_accuracy_level is not None,
                     "--head-bits 4 with --int4 qdq, whose operator Gather takes no 4-bit numbers":
                         self.int4 == "qdq" and self.head_bits == 4}
        else:
            names = {"--dtype": self.dtype not in (None, "fp32"), "--accuracy-level": self.accuracy_level != "auto",
                     "--head-accuracy-level": self.head_accuracy_level is not None, "--int4": self.int4 != "nbits",
                     "--head-bits": self.head_bits is not None}
            why = f"with --exporter {self.exporter}, which writes float32"
            given = {f"{name} {why}": is_given for name, is_given in names.items()}
        return [f"{what} (leave it out)" for what, is_given in given.items() if is_given]
