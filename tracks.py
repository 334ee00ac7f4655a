"""What is in a folder of music, or in a manifest, and what is said of each track: captions, metadata, tags.

music/a.mp3, music/a.txt            a caption beside it
music/a.mp3, music/a.json           {"caption": "...", "genre": "jazz"}; audiocraft's "description" as well
manifest.jsonl, data.jsonl.gz       {"path": "a.wav", "caption": "..."} a line, or the paths alone
music/jazz/a.mp3                    nothing: its tags and its folder's name are what is known
"""

import codecs
import gzip
import json
import os
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import mutagen
import soundfile

from codec import OTHER_SUFFIXES, SUFFIXES
from common import UserError, first_line

MANIFESTS = ("data.jsonl", "data.jsonl.gz", "manifest.jsonl")  # taken from a folder without audio
NOT_METADATA = "duration sample_rate file_extension amplitude weight info_path".split()  # of audiocraft's entries
TAGS = {  # what a tag is called in ID3, in Vorbis comments, and by libsndfile
    "genre": ("TCON", "genre"), "title": ("TIT2", "title"), "mood": ("TMOO", "mood"), "bpm": ("TBPM", "bpm"),
    "key": ("TKEY", "initialkey", "key"), "comment": ("COMM", "comment", "description"),
    "artist": ("TPE1", "artist"), "album": ("TALB", "album"),
}  # fmt: skip


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with its mark, maybe gzipped; raises UserError for what is none of these."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is no text in UTF-8; save it as UTF-8")
    return text


def plain(text):
    """A caption on one line, without letters that nobody sees: controls, zero-width ones, marks of direction."""
    unseen = ("Cc", "Cf", "Cs", "Co", "Cn")
    return " ".join("".join(" " if unicodedata.category(c) in unseen else c for c in text).split())


def take_captions(entry, where):
    """Takes "caption", or "description" as audiocraft has it, out of an entry -> its captions, none empty."""
    captions = []
    for found in (entry.pop("caption", None), entry.pop("description", None)):
        found = found if isinstance(found, list) else [found or ""]
        if not all(isinstance(caption, str) for caption in found):
            raise UserError(f'{where}: "caption" must be text, or a list of texts, not {found[0]!r}')
        captions = captions or [caption for caption in map(plain, found) if caption]
    return captions


def metadata_of(entry):
    """What an entry says besides, texts and numbers: lists become text; what is null, empty or nested is left out."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, list):
            value = ", ".join(str(part) for part in value if isinstance(part, (str, int, float)) and part != "")
        value = plain(value) if isinstance(value, str) else value
        if isinstance(value, (str, int, float)) and value != "" and plain(key) and key not in NOT_METADATA:
            found[plain(key)] = value
    return found


def tracks_of_manifest(manifest):
    """JSONL lines {"path", "caption", ...}; other keys are metadata.

    Paths are relative to the manifest or, as audiocraft's are, to where one stands. A track of which its line says
    nothing has what stands beside it.
    """
    try:
        lines = read_text(manifest).split("\n")
    except UserError:
        raise UserError(f"{manifest}: neither a folder of audio nor a JSONL manifest; give the folder") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({first_line(error)}); one object per line is needed") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f'{where}: has no "path"; needed is {{"path": "a.wav", "caption": "..."}}')
        if not isinstance(entry.get("attributes") or {}, dict):
            raise UserError(f'{where}: "attributes" must be an object, {{"genre": "jazz"}}')
        given = Path(entry.pop("path"))
        path = manifest.parent / given
        if not path.is_file() and given.is_file():
            path = given
        if not path.is_file():
            raise UserError(f"{where}: {path}: no such file")
        yield path, entry if metadata_of(entry) else read_sidecars(path), where


def files_under(folder):
    """Every file in a folder, and in folders that are linked there, each once."""

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or move it away")

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))  # a folder before links to it
        seen.add(os.path.realpath(root))
        yield from (Path(root, name) for name in files)


def read_sidecars(path):
    """What NAME.txt and NAME.json beside an audio file say of it."""
    entry = {}
    for sidecar in filter(Path.is_file, (path.with_suffix(".json"), path.with_suffix(".JSON"))):
        try:
            entry = json.loads(read_text(sidecar))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{sidecar}: not JSON ({first_line(error)})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("attributes") or {}, dict):
            raise UserError(f'{sidecar}: must hold an object, {{"caption": "...", "genre": "jazz"}}')
    for text in filter(Path.is_file, (path.with_suffix(".txt"), path.with_suffix(".TXT"))):
        if caption := plain(read_text(text)):
            entry["caption"] = caption
    return entry


def tracks_of_folder(folder):
    for path in sorted(files_under(folder)):
        if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES:
            yield path, read_sidecars(path), path.with_suffix(".json")


def find_tracks(music):
    """-> a list of {"path", "melody_from", "name", "caption", "metadata"}; the name is the path relative to the music.

    A track of several captions has "captions" too, and the first of them is its "caption". melody_from is the file
    whose melody is the track's: a stem that the entry names, relative to the manifest or the track's folder, or the
    track itself. The metadata are the other keys, those of an inner "attributes" among them.
    """
    music = Path(music)
    if not music.exists():
        raise UserError(f"{music}: no such folder or manifest")
    found = list(tracks_of_folder(music) if music.is_dir() else tracks_of_manifest(music))
    manifests = [music / name for name in MANIFESTS if (music / name).is_file()]
    if manifests and not found:
        return find_tracks(manifests[0])
    if manifests:
        print(f"{manifests[0]} is not read, as the folder was given; give the manifest to go by it")
    root = music if music.is_dir() else music.parent
    tracks = []
    for path, entry, where in found:
        captions = take_captions(entry, where)
        attributes = entry.pop("attributes", None) or {}
        stem = entry.pop("melody_from", None)
        stem = (path.parent if music.is_dir() else root) / str(stem) if stem else path
        if not stem.is_file() and stem != path:
            raise UserError(f"{where}: melody_from {stem}: no such file")
        name = os.path.relpath(path, root)
        track = dict(path=str(path), melody_from=str(stem), name=name, caption=captions[0] if captions else "",
                     metadata=metadata_of({**entry, **attributes}))  # fmt: skip
        tracks.append(track | ({"captions": captions} if len(captions) > 1 else {}))
    if not tracks:
        raise UserError(f"{music}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    name, times = Counter(track["name"] for track in tracks).most_common(1)[0]
    if times > 1:
        raise UserError(f"{music}: names {name} more than once; each track is needed once")
    return tracks


def read_tags(path, wanted):
    """The tags of a file whose names are in `wanted` -> {name: text}, in that order. Unreadable tags are none."""
    if not wanted:
        return {}
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            others = file.copy_metadata()
        with open(path, "rb") as file:
            tags = getattr(mutagen.File(file), "tags", None)
    except (soundfile.LibsndfileError, mutagen.MutagenError, OSError):
        return {}
    found = {}
    for name in wanted:
        frame, *keys = TAGS[name]
        if hasattr(tags, "getall"):  # ID3
            frames = [tag for tag in tags.getall(frame) if not getattr(tag, "desc", "")]
            texts = [text for tag in frames for text in (tag.genres if frame == "TCON" else map(str, tag.text))]
        else:
            texts = [text for key in keys for text in (tags or {}).get(key, [])]
        text = plain(", ".join(texts) or "".join(others.get(key, "") for key in keys[:1]))
        if text not in ("", "0"):
            found[name] = text
    return found


def folder_of(name):
    """The folders that a track is in, as words: 'jazz_trio/slow/01.mp3' -> 'jazz trio, slow'; numbers say nothing."""
    folders = Path(name).parts[:-1]
    folders = folders[-1:] if ".." in folders else folders  # of a path that leads away from the manifest, the last
    parts = (part.replace("_", " ").strip() for part in folders)
    return plain(", ".join(part for part in parts if any(map(str.isalpha, part))))
