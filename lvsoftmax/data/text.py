"""Reads text files of any size, plain or compressed."""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = ("", ".gz", ".bz2", ".xz", ".zst")
_BLOCK = 1 << 20  # bytes read at a time


def read_blocks(path: Path) -> Iterator[str]:
    """Yield a text file in blocks of about a megabyte, cut after whitespace, so that any file takes bounded memory.

    The last line is ended where the file does not end it. A byte order mark at the start is skipped.

    Raises:
        ValueError: the file is not UTF-8, damaged, or not compressed as its name says.
    """
    offset, block, text = 0, b"", "\n"
    with _open(path) as stream:
        try:
            while chunk := stream.read(_BLOCK):
                block += chunk
                cut = 1 + max(block.rfind(b" "), block.rfind(b"\n"))
                text = block[:cut].decode("utf-8")
                yield text if offset else text.removeprefix("\ufeff")
                offset, block = offset + cut, block[cut:]
            if block or not text.endswith("\n"):
                text = block.decode("utf-8") + "\n"
                yield text if offset else text.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {offset + error.start} (0x{block[error.start]:02x}); convert it, for "
                "instance by iconv -f latin1 -t utf-8"
            ) from None
        except Exception as error:  # each decompressor has its own
            raise ValueError(f"{path} cannot be read after byte {offset}: {error}; get an intact copy") from error


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix:
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            try:
                import zstandard
            except ModuleNotFoundError:
                raise ValueError(f"{path} needs the package zstandard: pip install 'lvsoftmax[zst]'") from None
            frames = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
            return io.BufferedReader(frames)  # type: ignore[arg-type]
    return open(path, "rb")
