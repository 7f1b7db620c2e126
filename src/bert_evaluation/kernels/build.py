"""The kernels' C++: what it is compiled of and how."""

from functools import cache
from pathlib import Path

from bert_evaluation import extension

SOURCES = ("linear.cpp", "attention.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fno-math-errno")


@cache
def why_not_built() -> str | None:
    """Compile and load the kernels, unless that is done; why that failed, if it did (see `extension`)."""
    return extension.why_not_loaded("kernels", Path(__file__).parent, SOURCES, FLAGS)
