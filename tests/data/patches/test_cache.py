"""The cache of prepared cases: content-addressed, atomic, size-limited, shared by processes that may be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets.layouts import Case
from data.files import file_sha256
from data.patches import cache
from data.patches.cache import ARRAYS, CaseFolder, SharedCache

properties = settings(derandomize=True, deadline=None, max_examples=25)
#: Size in bytes of an entry written by `entry`, including its source.json.
SIZE = 3 * (128 + 1000) + 2
SETTINGS = {"spacing_mm": [1.0, 1.0, 1.0]}


def entry(folder: Path) -> None:
    for name in ARRAYS:
        np.save(folder / name, np.ones(1000, dtype=np.uint8))
    (folder / "source.json").write_text("{}")


def case_in(folder: Path, name: str = "a", content: bytes = b"voxels", *, age_seconds: float = 100) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}_{kind}.nii" for kind in ("t1", "seg")}
    for kind, path in paths.items():
        path.write_bytes(content + kind.encode())
        then = path.stat().st_mtime_ns - int(age_seconds * 1e9)
        os.utime(path, ns=(then, then))
    return Case(id=name, folder=folder, contrasts={"t1": paths["t1"]}, label=paths["seg"])


@contextmanager
def shared(folder: Path, *, most_bytes: int = 100 * SIZE) -> Iterator[SharedCache]:
    overflow = CaseFolder(folder.with_name("overflow"))
    with closing(SharedCache(folder, most_bytes=most_bytes, overflow=overflow)) as store:
        yield store


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def leftovers(folder: Path) -> list[Path]:
    return [*folder.glob(".partial-*"), *(folder / ".users").iterdir()]


def in_process(code: str, folder: Path, *, stdout: int | None = None) -> subprocess.Popen[str]:
    """Run Python code in a process that has the shared cache of a folder open as ``store``."""
    lines = f"""
        import os, signal, sys, time
        from pathlib import Path
        import numpy as np
        from data.patches.cache import ARRAYS, CaseFolder, SharedCache

        def entry(folder):
            for name in ARRAYS:
                np.save(folder / name, np.ones(1000, dtype=np.uint8))
            (folder / "source.json").write_text("{{}}")

        folder = Path(sys.argv[1])
        store = SharedCache(folder, most_bytes={100 * SIZE}, overflow=CaseFolder(folder.with_name("overflow")))
    """
    words = [sys.executable, "-c", textwrap.dedent(lines) + textwrap.dedent(code), str(folder)]
    return subprocess.Popen(words, text=True, stdout=stdout, env={**os.environ, "OMP_NUM_THREADS": "1"})


# Keys


def test_a_renamed_copy_of_a_case_has_the_same_key(tmp_path: Path) -> None:
    store = CaseFolder(tmp_path / "cache")
    one, other = case_in(tmp_path / "x", "a"), case_in(tmp_path / "y", "b", age_seconds=5000)
    assert store.key(one, SETTINGS) == store.key(other, SETTINGS)


def test_content_settings_label_map_and_program_version_each_change_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, case = CaseFolder(tmp_path / "cache"), case_in(tmp_path / "x")
    keys = [store.key(case, SETTINGS), store.key(case, {"spacing_mm": [2.0, 1.0, 1.0]})]
    keys.append(store.key(Case(id="a", folder=case.folder, contrasts=case.contrasts), SETTINGS))
    keys.append(store.key(case_in(tmp_path / "y", content=b"other voxels"), SETTINGS))
    monkeypatch.setattr(cache, "_program", lambda: ["another"])
    keys.append(store.key(case, SETTINGS))
    assert len(set(keys)) == len(keys)


def test_a_file_is_hashed_once_and_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(cache, "file_sha256", lambda path: (hashed.append(path), file_sha256(path))[1])
    with shared(tmp_path / "cache") as store:
        case = case_in(tmp_path / "x")
        keys = [store.key(case, SETTINGS) for _ in range(3)]
        assert (len(set(keys)), len(hashed)) == (1, 2)
        assert store.key(case_in(tmp_path / "x", content=b"other voxels", age_seconds=50), SETTINGS) not in keys
        assert len(hashed) == 4


def test_a_very_recently_changed_file_is_hashed_every_time(tmp_path: Path) -> None:
    with shared(tmp_path / "cache") as store:
        first = store.key(case_in(tmp_path / "x", content=b"one", age_seconds=0), SETTINGS)
        stamp = (tmp_path / "x" / "a_t1.nii").stat().st_mtime_ns
        case = case_in(tmp_path / "x", content=b"two", age_seconds=0)
        for path in (tmp_path / "x").iterdir():
            os.utime(path, ns=(stamp, stamp))  # as with a coarse clock
        assert store.key(case, SETTINGS) != first


def test_a_missing_file_is_a_system_error(tmp_path: Path) -> None:
    case = case_in(tmp_path / "x")
    case.contrasts["t1"].unlink()
    with pytest.raises(FileNotFoundError):
        CaseFolder(tmp_path).key(case, SETTINGS)


# Entries


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_an_added_entry_is_found_complete(tmp_path: Path, kind: str) -> None:
    with shared(tmp_path / "cache") as many:
        store = many if kind == "shared" else CaseFolder(tmp_path / "cache")
        assert store.find("k") is None
        assert store.add("k", entry) == tmp_path / "cache" / "k" == store.find("k")
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["empty", "gone", "no source"])
def test_a_damaged_entry_is_not_found_and_is_replaced(tmp_path: Path, damage: str) -> None:
    with shared(tmp_path / "cache") as store:
        place = store.add("k", entry)
        if damage == "empty":
            (place / "image.npy").write_bytes(b"")
        else:
            (place / ("codes.npy" if damage == "gone" else "source.json")).unlink()
        assert store.find("k") is None
        assert store.add("k", entry) == store.find("k") == place


def test_an_entry_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        entry(folder)
        raise RuntimeError("half way")

    with shared(tmp_path / "cache") as store:
        with pytest.raises(RuntimeError):
            store.add("k", fails)
        assert entries(tmp_path / "cache") == set()
    assert leftovers(tmp_path / "cache") == []


def test_threads_that_create_one_entry_concurrently_all_get_the_same(tmp_path: Path) -> None:
    with shared(tmp_path / "cache") as store:
        start, places = threading.Barrier(8), []

        def add() -> None:
            start.wait()
            places.append(store.add("k", entry))

        threads = [threading.Thread(target=add) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert places == [store.find("k")] * 8
    assert leftovers(tmp_path / "cache") == []


def test_processes_that_create_the_same_entries_concurrently_all_find_them_complete(tmp_path: Path) -> None:
    code = """
        for round in range(30):
            key = f"k{round % 5}"
            place = store.find(key) or store.add(key, entry)
            assert np.load(place / "image.npy").sum() == 1000
        assert store.problem is None
        store.close()
    """
    (tmp_path / "cache").mkdir()
    processes = [in_process(code, tmp_path / "cache") for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert entries(tmp_path / "cache") == {f"k{number}" for number in range(5)}
    assert leftovers(tmp_path / "cache") == []


def test_leftovers_of_a_killed_process_are_removed_and_block_nobody(tmp_path: Path) -> None:
    code = """
        def killed(folder):
            entry(folder)
            os.kill(os.getpid(), signal.SIGKILL)

        store.hold(["k"])
        store.add("whole", entry)
        store.add("k", killed)
    """
    assert in_process(code, tmp_path / "cache").wait(60) == -signal.SIGKILL
    assert len(leftovers(tmp_path / "cache")) == 2
    with shared(tmp_path / "cache") as store:
        assert [path.name.split("-")[0] for path in leftovers(tmp_path / "cache")] == [str(os.getpid())]
        assert entries(tmp_path / "cache") == {"whole"}
        assert store.add("k", entry) == store.find("k")


def test_files_that_a_live_process_is_writing_are_kept(tmp_path: Path) -> None:
    with shared(tmp_path / "cache") as store:

        def interrupted(folder: Path) -> None:
            with shared(tmp_path / "cache"):
                entry(folder)

        assert store.add("k", interrupted) == store.find("k")


# Size limit


@properties
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=30), st.integers(1, 5))
def test_the_cache_never_exceeds_its_limit_and_keeps_entries_in_use(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, bool]], room: int
) -> None:
    folder = tmp_path_factory.mktemp("bound") / "cache"
    held: set[str] = set()
    with shared(folder, most_bytes=room * SIZE) as holding, shared(folder, most_bytes=room * SIZE) as store:
        for key, hold in asked:
            if hold and store.find(key) is not None:
                holding.hold([key])
                held.add(key)
            assert cache._is_whole(store.find(key) or store.add(key, entry))
            assert sum(p.stat().st_size for p in folder.glob("[!.]*/*")) <= room * SIZE
            assert held & entries(folder) == held & {p.name for p in folder.iterdir()}
            assert all((folder / name).is_dir() or store.problem for name in held)


def test_the_least_recently_used_entry_is_evicted_first(tmp_path: Path) -> None:
    with shared(tmp_path / "cache", most_bytes=3 * SIZE) as store:
        for age, key in enumerate("abc"):
            os.utime(store.add(key, entry) / "source.json", ns=(age, age))
        store.find("a")
        store.add("d", entry)
        assert entries(tmp_path / "cache") == {"a", "c", "d"}


def test_entries_in_use_stay_and_the_rest_goes_to_the_overflow(tmp_path: Path) -> None:
    with shared(tmp_path / "cache", most_bytes=2 * SIZE) as store:
        store.hold(["a", "b", "c"])
        places = [store.add(key, entry) for key in "abc"]
        assert places == [tmp_path / "cache" / "a", tmp_path / "cache" / "b", tmp_path / "overflow" / "c"]
        assert store.find("c") == places[2]
        assert "the limit of" in str(store.problem)


def test_entries_used_by_another_process_stay_until_it_ends_in_any_way(tmp_path: Path) -> None:
    code = """
        store.hold(["a"])
        store.add("a", entry)
        print("held", flush=True)
        time.sleep(60)
    """
    process = in_process(code, tmp_path / "cache", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with shared(tmp_path / "cache", most_bytes=SIZE) as store:
        assert store.info().in_use == 1
        assert store.clear().entries == 1
        assert store.add("b", entry).parent.name == "overflow"
        process.kill()
        process.wait(60)
        assert store.info().in_use == 0
        assert store.clear().entries == 0
    process.stdout.close()


def test_clearing_deletes_every_entry_that_is_not_in_use(tmp_path: Path) -> None:
    with shared(tmp_path / "cache") as store:
        store.key(case_in(tmp_path / "x"), SETTINGS)
        store.hold(["a"])
        for key in "abc":
            store.add(key, entry)
        left = store.clear()
        assert (left.entries, left.in_use, entries(tmp_path / "cache")) == (1, 1, {"a"})
        assert list((tmp_path / "cache" / ".known").iterdir()) == []


def test_the_reported_size_is_that_of_the_files(tmp_path: Path) -> None:
    with shared(tmp_path / "cache") as store:
        store.add("a", entry)
        told = store.info().to_json()
    assert told == {
        "folder": str(tmp_path / "cache"),
        "entries": 1,
        "bytes": SIZE,
        "limit_bytes": 100 * SIZE,
        "in_use": 0,
    }


def break_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink() if path.is_file() else [*map(Path.unlink, path.iterdir()), path.rmdir()]
    folder.rmdir()
    folder.write_text("a file")


@pytest.mark.parametrize("spoil", [break_folder], ids=["a file in its place"])
def test_a_cache_that_fails_while_in_use_is_replaced_by_the_overflow(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    with shared(tmp_path / "cache") as store:
        spoil(tmp_path / "cache")
        store.hold(["k"])
        assert store.find("k") is None
        assert store.add("k", entry) == tmp_path / "overflow" / "k" == store.find("k")
        assert str(tmp_path / "cache") in str(store.problem)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/cache"), shared(tmp_path / "file" / "cache"):
        pass
