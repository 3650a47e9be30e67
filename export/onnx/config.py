"""What `llmc export --format onnx` can be asked for. Importing this imports neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.errors import UserError

EXPORTERS = ("builder", "optimum")
DTYPES = ("fp32", "fp16", "int8", "w8a8")
LEVELS = ("auto", "0", "4")
INT4_FORMS = ("nbits", "qdq")
HEAD_BITS = (4, 8, 16)


@dataclass(frozen=True)
class OnnxExportConfig:
    """Options of the ONNX exporter; the command line has the same names and defaults."""

    model: Path | str | None = None
    """Model folder, float or quantized (or a hub id). None: the newest artifact made in this working folder."""
    out: Path | None = None
    """The folder to write. None: `<model folder>-onnx` in the working folder."""
    exporter: str = "builder"
    """'builder': onnxruntime-genai's, for ONNX Runtime. 'optimum': optimum-onnx's, float32 in standard operators alone."""
    dequantize: bool = False
    """exporter 'optimum': write the values of a quantized model as float32; else it is refused."""
    dtype: str | None = None
    """How a float model's matrices are stored: 'fp32', 'fp16', or 'int8' (rounded, in blocks of 32), computed in float32;
    or 'w8a8', int8 with a scale for each row, multiplied with inputs that are int8 with a scale for each token. None: 'fp16'.
    A quantized model carries its codes and takes none."""
    accuracy_level: str = "auto"
    """'0': float32 activations. '4': activations rounded to 8 bits in blocks, which is faster. 'auto': both are measured
    when the file is written, and the faster is taken if it loses little."""
    head_accuracy_level: str | None = None
    """The same of the output matrix alone, where it is quantized: at level 0 an 8-bit one takes most of a token's time. None:
    as `accuracy_level`, measured apart where that is 'auto'."""
    int4: str = "nbits"
    """'nbits': ONNX Runtime's MatMulNBits. 'qdq': standard DequantizeLinear and MatMul, for other runtimes."""
    head_bits: int | None = None
    """Bits of the embedding and the output matrix. None: what the folder asks for where ONNX holds it, 8 beside a
    quantized decoder, else as `dtype`."""
    chat_template: str = "keep"
    """'keep', 'drop', or the path of a Jinja file."""
    threads: int | None = None
    """Threads of the checks in ONNX Runtime and torch. None: this machine's physical cores."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value!r} (one of {', '.join(map(str, allowed))})"
            for name, value, allowed in (
                ("--exporter", self.exporter, EXPORTERS),
                ("--dtype", self.dtype, DTYPES), ("--accuracy-level", self.accuracy_level, LEVELS),
                ("--head-accuracy-level", self.head_accuracy_level, LEVELS),
                ("--int4", self.int4, INT4_FORMS), ("--head-bits", self.head_bits, HEAD_BITS))
            if value is not None and value not in allowed
        ]
        if self.threads is not None and self.threads < 1:
            wrong.append(f"--threads {self.threads} (1 or more)")
        wrong += self._contradictions()
        if wrong:
            raise UserError("not possible: " + "; ".join(wrong), "choose one of the values in brackets")

    def _contradictions(self) -> list[str]:
        """Options that were given and that the exporter or form asked for does not have."""
        if self.exporter == "builder":
            given = {"--dequantize with --exporter builder, which carries the codes": self.dequantize,
                     "--head-accuracy-level with --int4 qdq, whose level is one for all matrices":
                         self.int4 == "qdq" and self.head_accuracy_level is not None}
        else:
            names = {"--dtype": self.dtype not in (None, "fp32"), "--accuracy-level": self.accuracy_level != "auto",
                     "--head-accuracy-level": self.head_accuracy_level is not None, "--int4": self.int4 != "nbits",
                     "--head-bits": self.head_bits is not None}
            given = {f"{name} with --exporter optimum, which writes float32": is_given for name, is_given in names.items()}
        return [f"{what} (leave it out)" for what, is_given in given.items() if is_given]
