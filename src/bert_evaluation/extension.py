"""C++ of ours compiled for this processor, once, and kept."""

import ctypes
import hashlib
import os
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import platformdirs
import torch

from bert_evaluation.device import processor


def cache_folder() -> Path:
    """Where what was compiled is kept, under names made of all that it depends on: the user's cache folder."""
    return Path(platformdirs.user_cache_dir("bert-evaluation", appauthor=False))


def about_this_machine() -> list[str]:
    """What compiled code depends on beside its source: processor, compiler, torch."""
    # Virtual machines of different processors may have one name.
    able = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    return [torch.__version__, processor(), *able, os.environ.get("CXX", "")]


def why_not_loaded(name: str, folder: Path, sources: Sequence[str], flags: Sequence[str]) -> str | None:
    """Compile these sources in a folder, or take what was compiled before, and load it; why that failed, if it did.

    What is compiled is kept in the cache folder, for these sources and the headers beside them.
    """
    library = cache_folder() / f"{name}-{_key(folder, flags)}.so"
    try:
        if not library.exists():
            _compile(name, [str(folder / each) for each in sources], flags, library)
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # what is loaded later may call its functions
    except (OSError, RuntimeError, ImportError) as error:
        return f"The {name} could not be compiled ({_said(error)}); they need g++ and ninja."
    return None


def _said(error: Exception) -> str:
    """The first line that names an error: in front of it is the compiler's command."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])


def _key(folder: Path, flags: Sequence[str]) -> str:
    sources = [file.read_bytes() for file in sorted((*folder.glob("*.h"), *folder.glob("*.cpp")))]
    about = [*about_this_machine(), *flags]
    return hashlib.sha256(b"\n".join([*sources, *(each.encode() for each in about)])).hexdigest()[:16]


def _compile(name: str, sources: list[str], flags: Sequence[str], library: Path) -> None:
    from torch.utils import cpp_extension  # takes half a second to import

    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise OSError(f"there is no {compiler}")
    if shutil.which("ninja") is None:  # as when the environment's folder of programs is not on the path
        import ninja

        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"
    library.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that two processes do not meet and one that was killed leaves no lock behind.
    with tempfile.TemporaryDirectory(dir=library.parent) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpp_extension.load(name, sources, extra_cflags=list(flags), build_directory=place, is_python_module=False)
        os.replace(Path(place) / f"{name}.so", library)
