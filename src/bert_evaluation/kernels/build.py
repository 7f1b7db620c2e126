"""The kernels' C++ compiled for this processor, once, and kept."""

import hashlib
import os
import shlex
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import platformdirs
import torch

from bert_evaluation.device import processor

SOURCES = ("linear.cpp", "attention.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fno-math-errno")


@cache
def why_not_built() -> str | None:
    """Compile the kernels, or take those that were compiled before, and load them; why that failed, if it did.

    What is compiled lies in the user's cache folder, under a name made of all that it depends on.
    """
    folder = Path(platformdirs.user_cache_dir("bert-evaluation", appauthor=False))
    library = folder / f"kernels-{_key()}.so"
    try:
        if not library.exists():
            _compile(folder, library)
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, ImportError) as error:
        return f"The kernels could not be compiled ({_said(error)}); they need g++ and ninja."
    return None


def _said(error: Exception) -> str:
    """The first line that names an error: in front of it is the compiler's command."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


def _key() -> str:
    here = Path(__file__).parent
    sources = [file.read_bytes() for file in sorted((*here.glob("*.h"), *here.glob("*.cpp")))]
    # Virtual machines of different processors may have one name.
    able = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    about = [torch.__version__, processor(), *able, os.environ.get("CXX", ""), *FLAGS]
    return hashlib.sha256(b"\n".join([*sources, *(each.encode() for each in about)])).hexdigest()[:16]


def _compile(folder: Path, library: Path) -> None:
    from torch.utils import cpp_extension  # takes half a second to import

    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise OSError(f"there is no {compiler}")
    if shutil.which("ninja") is None:  # as when the environment's folder of programs is not on the path
        import ninja

        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that two processes do not meet and one that was killed leaves no lock behind.
    with tempfile.TemporaryDirectory(dir=folder) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpp_extension.load(
            "kernels",
            [str(Path(__file__).parent / each) for each in SOURCES],
            extra_cflags=list(FLAGS),
            build_directory=place,
            is_python_module=False,
        )
        os.replace(Path(place) / "kernels.so", library)
