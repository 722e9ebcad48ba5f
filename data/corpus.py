"""Documents out of files, in constant memory.

A document travels as pieces of a few hundred thousand characters, so that a text of any size streams through. They
tokenize exactly as the whole text would (cuts.py).
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import zlib
from dataclasses import dataclass
from typing import Iterable, Iterator, Optional

from common import InputError, open_input
from cuts import LONGEST, MARGIN, WORD_END, Cutter, Encode, NoPlace

PIECE = 1 << 18  # characters: long enough that a worker's round trip is noise, short enough to keep many in flight
CHUNK = 1 << 18  # bytes to read at a time
# A zstd block of a few bytes can stand for 128 KiB, so compressed input goes to the decoder in small bites.
ZSTD_CHUNK = 1 << 12
LONGEST_LINE = 1 << 30  # a JSON line is held whole; a file without newlines must not eat the machine
SPACES = " \t\r\n\v\f"  # ASCII only: str.strip() would also take the 0xA0 and 0x85 bytes of raw-byte documents
END = None  # in a stream of chunks: the document ends here

TEXT, LINES, PARQUET = "text", "lines", "parquet"
KINDS = {".txt": TEXT, ".text": TEXT, ".md": TEXT, ".jsonl": LINES, ".ndjson": LINES, ".parquet": PARQUET}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# How files begin that hold no text, whatever they are called.
MAGICS = {
    "gzip": rb"\x1f\x8b", "zstd": rb"\x28\xb5\x2f\xfd", "bzip2": rb"BZh[1-9]1AY&SY", "xz": rb"\xfd7zXZ\x00",
    "zip": rb"PK\x03\x04", "7z": rb"7z\xbc\xaf\x27\x1c", "lz4": rb"\x04\x22\x4d\x18", "parquet": rb"PAR1[\x00-\x1f]",
}


@dataclass(frozen=True)
class Source:
    path: str
    kind: str
    compression: str  # "" or one of COMPRESSED
    size: int  # bytes on disk


def classify(path: str) -> Optional[tuple[str, str]]:
    """(kind, compression) by file name, None for a name that says nothing."""
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in COMPRESSED else ""
    kind = KINDS.get(os.path.splitext(stem)[1] if compression else suffix)
    return (kind, compression) if kind and not (kind == PARQUET and compression) else None


def refuse_folder(error: OSError):
    raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def find_sources(inputs: list[str]) -> tuple[list[Source], int]:
    """The files to read, in a fixed order, and how many other files the directories held."""
    sources, others = [], 0
    for given in inputs:
        if not os.path.exists(given):
            raise InputError(f"{given}: no such file or directory")
        if not os.path.isdir(given):
            if given.lower().endswith(".json"):
                raise InputError(f"{given}: one JSON value is not a corpus; give JSON lines, named .jsonl")
            suffix = os.path.splitext(given.lower())[1]
            # A file named by hand with an unknown suffix is text: source code, a book without a suffix.
            kind, compression = classify(given) or (TEXT, suffix if suffix in COMPRESSED else "")
            sources.append(Source(given, kind, compression, os.path.getsize(given)))
            continue
        seen: set[str] = set()  # folders, by their real paths: links may lead back, or twice to the same
        for folder, folders, names in os.walk(given, followlinks=True, onerror=refuse_folder):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(folder, name)
                found = None if name.startswith(".") else classify(name)
                if found and os.path.isfile(path):
                    sources.append(Source(path, *found, os.path.getsize(path)))
                else:
                    others += 1
    if not sources:
        raise InputError(
            f"{', '.join(inputs)}: no files to read; directories are searched for {' '.join(KINDS)}"
            f" (text and JSON lines also as {', '.join(COMPRESSED)})"
        )
    return sources, others


class ZstdReader(io.RawIOBase):
    """Concatenated zstd frames as one stream. The library's own reader takes a torn frame for the end of the file."""

    def __init__(self, file):
        import zstandard

        self.file, self.zstandard = file, zstandard
        self.frame, self.compressed, self.plain = None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.plain:
            self.compressed = self.compressed or self.file.read(ZSTD_CHUNK)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.plain = memoryview(self.frame.decompress(self.compressed))
            except self.zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            ended = self.frame.eof
            self.compressed = self.frame.unused_data if ended else b""
            self.frame = None if ended else self.frame
        count = min(len(buffer), len(self.plain))
        buffer[:count] = self.plain[:count]
        self.plain = self.plain[count:]
        return count


def mark_ends(chunks: Iterable[str], separator: str) -> Iterator[Optional[str]]:
    """The chunks of a file with END where a document ends: at each separator and at the end of the file. A newline of
    the separator is a CRLF, too."""
    places = re.compile(re.escape(separator).replace("\\\n", "\r?\n"))
    overlap = len(separator) + separator.count("\n") - 1  # a separator may straddle two chunks
    tail = ""
    for chunk in chunks:
        if not separator:
            yield chunk
            continue
        *whole, last = places.split(tail + chunk)
        for part in whole:
            yield part
            yield END
        keep = max(0, len(last) - overlap)
        tail = last[keep:]
        yield last[:keep]
    yield tail
    yield END


class Corpus:
    """The documents of some files. Each call of pieces() reads them from the start, in the same order."""

    def __init__(
        self, sources: list[Source], *, field="text", split_on="", skip_bad=False, replace_invalid=False, raw=False
    ):
        self.sources, self.field, self.split_on = sources, field, split_on
        self.skip_bad, self.replace_invalid, self.raw = skip_bad, replace_invalid, raw
        self.encode: Optional[Encode] = None  # by which pieces are cut; without it anywhere
        self.total = sum(source.size for source in sources)  # bytes on disk
        self.reset()

    def reset(self):
        self.done = 0  # bytes on disk of the files already read
        self.file = None
        self.documents = self.empty = self.bad = self.replaced = self.separators = 0

    def position(self) -> int:
        """Bytes on disk read so far: exact for compressed files too, so progress is honest."""
        return self.done + (self.file.tell() if self.file and not self.file.closed else 0)

    def pieces(self) -> Iterator[tuple[bool, str]]:
        """(starts a document, text). With raw=True each character is one byte (latin-1)."""
        self.reset()
        read = {TEXT: self.read_text, LINES: self.read_lines, PARQUET: self.read_parquet}
        for source in self.sources:
            try:
                for starts, text in read[source.kind](source):
                    self.documents += starts
                    yield starts, text
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # damage arrives as these
                raise InputError(
                    f"{source.path}: cannot be read ({getattr(error, 'strerror', None) or error})"
                ) from error
            except NoPlace as error:
                raise InputError(f"{source.path}: {error}") from error
            finally:
                if self.file:
                    self.file.close()
            self.done += source.size

    def open(self, source: Source) -> io.BufferedIOBase:
        self.file = open_input(source.path)
        if source.compression == ".gz":
            return gzip.GzipFile(fileobj=self.file)
        if source.compression == ".zst":
            return io.BufferedReader(ZstdReader(self.file), CHUNK)
        if source.compression == ".bz2":
            return bz2.BZ2File(self.file)
        if source.compression == ".xz":
            return lzma.LZMAFile(self.file)
        begins = self.file.peek(16)
        for kind, magic in MAGICS.items():
            if re.match(magic, begins):
                raise InputError(f"{source.path}: is a {kind} file and no text; unpack it, or name it as what it is")
        return self.file

    def as_text(self, text: str) -> str:
        return text.encode().decode("latin-1") if self.raw else text

    def decoded(self, source: Source) -> Iterator[str]:
        stream = self.open(source)
        decoder = codecs.getincrementaldecoder("latin-1" if self.raw else "utf-8")()
        offset, bom = 0, "\u00ef\u00bb\u00bf" if self.raw else "\ufeff"
        while True:
            data = stream.read(CHUNK)
            held = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
            pending = decoder.getstate()[0] + data
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                if not self.replace_invalid:
                    raise InputError(
                        f"{source.path}: byte {offset - held + error.start:,} is not UTF-8; convert the file,"
                        " or use --replace-invalid or --raw-bytes"
                    ) from error
                # Decode what is whole and keep a character that the chunk's end cuts for the next chunk.
                text, used = codecs.utf_8_decode(pending, "replace", not data)
                self.replaced += text.count("\ufffd") - pending[:used].count(b"\xef\xbf\xbd")
                decoder.setstate((pending[used:], 0))
            if offset == 0 and text.startswith(bom):
                text = text[len(bom) :]
            offset += len(data)
            if text:
                yield text
            if not data:
                return

    def read_text(self, source: Source) -> Iterator[tuple[bool, str]]:
        strip = SPACES if self.split_on else ""  # a whole file keeps its every byte; parts lose the spaces around them
        rest, starts, cutter = "", True, Cutter(PIECE, self.encode)
        self.separators -= 1  # the end of the file is none
        for chunk in mark_ends(self.decoded(source), self.as_text(self.split_on)):
            if chunk is END:
                self.separators += 1
                rest = rest.rstrip(strip) if strip else rest
                if rest if not starts else rest.strip(SPACES):
                    yield starts, rest
                elif starts:
                    self.empty += 1
                rest, starts, cutter = "", True, Cutter(PIECE, self.encode)
                continue
            rest += chunk
            if starts and strip:
                rest = rest.lstrip(strip)
            while cut := cutter(rest):
                yield starts, rest[:cut]
                rest, starts = rest[cut:], False

    def whole(self, text: str) -> Iterator[tuple[bool, str]]:
        """A document that is already in memory, in pieces."""
        if not text.strip(SPACES):
            self.empty += 1
            return
        at, cutter = 0, Cutter(PIECE, self.encode)
        # A window: slicing the rest off would be quadratic.
        while cut := cutter(text[at : at + LONGEST + MARGIN]):
            yield at == 0, text[at : at + cut]
            at += cut
        yield at == 0, text[at:]

    def text_of_line(self, line: bytes) -> str:
        """The field of a JSON line; ValueError says what is wrong with it."""
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start:,} is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno:,})") from error
        except RecursionError as error:
            raise ValueError("JSON nested too deeply") from error
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        if not isinstance(record.get(self.field), str):
            raise ValueError(f'no text under "{self.field}"; name the right field with --field')
        try:
            record[self.field].encode()
        except UnicodeEncodeError as error:
            raise ValueError("half a surrogate pair, which is no character") from error
        return self.as_text(record[self.field])

    def read_lines(self, source: Source) -> Iterator[tuple[bool, str]]:
        stream = self.open(source)
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InputError(f"{source.path}:{number}: a line of more than {LONGEST_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                text = self.text_of_line(line[3:] if number == 1 and line.startswith(codecs.BOM_UTF8) else line)
            except ValueError as error:
                if not self.skip_bad:
                    raise InputError(f"{source.path}:{number}: {error}; --skip-bad leaves such lines out") from error
                self.bad += 1
                continue
            yield from self.whole(text)

    def read_parquet(self, source: Source) -> Iterator[tuple[bool, str]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(
                f"{source.path}: reading parquet needs pyarrow; install it with: pip install pyarrow"
            ) from error
        self.file = open_input(source.path)
        try:
            table = pyarrow.parquet.ParquetFile(self.file)
            if self.field not in table.schema_arrow.names:
                raise InputError(f'{source.path}: no column "{self.field}"; name the right one with --field')
            for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    yield from self.whole(self.as_text(text or ""))
        except pyarrow.ArrowException as error:
            raise InputError(
                f"{source.path}: not a parquet file that can be read ({str(error).splitlines()[0]})"
            ) from error


@dataclass
class Split:
    """Which text is for validation. With many documents, every n-th whole document; with few, the tail of each."""

    fraction: float
    lengths: Optional[list[int]]  # characters of each document where tails are cut, else None

    def of(self, pieces: Iterable[tuple[bool, str]]) -> Iterator[tuple[int, bool, str]]:
        """(side, starts, text): side 0 is for training, 1 for validation."""
        document, at, cut, side = -1, 0, 0, 0
        for starts, text in pieces:
            if starts:
                document, at = document + 1, 0
                if self.lengths is None:
                    # Spread evenly: exactly floor(n * fraction) of the first n documents, whatever n.
                    side = int((document + 1) * self.fraction) - int(document * self.fraction)
                else:
                    cut, side = int(self.lengths[document] * (1 - self.fraction)), 0
            if self.lengths is None or side == 1 or at + len(text) <= cut:
                at += len(text)
                yield side, starts, text
                continue
            # A line may end a tenth of the tail later than asked, not more, lest a long line swallow the tail.
            where = self.line_end(text, max(0, cut - at), (self.lengths[document] - cut) // 10)
            at += len(text)
            if text[:where]:
                yield 0, starts, text[:where]
            if text[where:]:
                side = 1
                yield 1, True, text[where:]

    @staticmethod
    def line_end(text: str, least: int, reach: int) -> int:
        """The first place from `least` on, within `reach`, where a line ends, else a word, else `least` itself."""
        line = text.find("\n", least, least + reach)
        if line >= 0:
            return line + 1
        word = WORD_END.search(text, least, least + reach)
        return word.start() if word else least


def survey(corpus: Corpus, fraction: float) -> Split:
    """Counts documents until there are enough for at least two in validation, and stops there: a corpus of many costs
    nothing, one of few is read twice."""
    if fraction == 0:
        return Split(0.0, None)
    lengths: list[int] = []
    for starts, text in corpus.pieces():
        if starts:
            if (len(lengths) + 1) * fraction >= 2:
                return Split(fraction, None)
            lengths.append(0)
        lengths[-1] += len(text)
    return Split(fraction, lengths)
