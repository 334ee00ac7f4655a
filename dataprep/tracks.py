"""Find the tracks of a folder or manifest and their text: captions, metadata, tags, and a tokenizer trained on them.

music/a.mp3, music/a.txt          a caption
music/a.mp3, music/a.json         {"caption": "...", "genre": "jazz"}; audiocraft's "description" works too
manifest.jsonl, data.jsonl.gz     {"path": "a.wav", "caption": "..."} per line; lines without text: as above
music/jazz/a.mp3                  without any text: tags, folder names, estimated tempo and key

Other keys of an entry become text, except "split", "group" (see `split_tracks`) and "melody_from".
"""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import mutagen
import mutagen.mp4
import sentencepiece
import soundfile

from audio import OTHER_SUFFIXES, SUFFIXES
from common import UserError, first_line, quote
from dataprep.analysis import KEYS
from dataprep.shards import captions_of, clean_text, group_of

MANIFESTS = ("data.jsonl", "data.jsonl.gz", "manifest.jsonl")  # read from a folder without audio
MANIFEST_LINE = '{"path": "a.wav", "caption": "..."}'
TEXT_SUFFIXES = ".txt .json .jsonl .csv .tsv .parquet .xlsx .xml .yaml .yml .caption .captions .cap .lab .lrc".split()
SYSTEM_FOLDERS = "__MACOSX @eaDir #recycle #snapshot $RECYCLE.BIN lost+found".split() + ["System Volume Information"]
MISSING = "nan none null nat n/a #n/a <na> inf -inf".split()  # as pandas and spreadsheets write it
SPLITS = {"train": "train", "training": "train"} | dict.fromkeys("valid validation val dev test".split(), "valid")
NOT_METADATA = "duration sample_rate file_extension amplitude weight info_path".split()  # of audiocraft's manifests
TAGS = {  # names of a tag in ID3, in MP4, and in Vorbis comments and libsndfile
    "genre": ("TCON", "©gen", "genre"), "title": ("TIT2", "©nam", "title"),
    "mood": ("TMOO", "----:com.apple.iTunes:MOOD", "mood"), "bpm": ("TBPM", "tmpo", "bpm"),
    "key": ("TKEY", "----:com.apple.iTunes:initialkey", "initialkey", "key"),
    "comment": ("COMM", "©cmt", "comment", "description"),
    "artist": ("TPE1", "©ART", "artist"), "album": ("TALB", "©alb", "album"),
}  # fmt: skip


def find_tracks(music, group_by=""):
    """Return a list of tracks {"path", "melody_from", "name", "caption", "metadata"}. Raises UserError for bad input.

    Print which files of the folder are not used.

    name          the path relative to the folder or manifest
    melody_from   the file whose melody is stored: a stem named by the entry, or the track itself
    caption       the first caption, or ""; a track with several also has "captions", a list of all
    metadata      all other keys of the entry and of its "attributes"
    split, group  of the entry, if it has them; group_by, see `group_of`, groups the others
    """
    music = Path(music)
    if not music.exists():
        raise UserError(f"{music}: no such folder or manifest")
    entries = list(read_folder(music) if music.is_dir() else read_manifest(music))
    manifests = [music / name for name in MANIFESTS if (music / name).is_file()]
    if manifests and not entries:
        return find_tracks(manifests[0], group_by)
    if manifests:
        print(f"{manifests[0]}: not used, because the folder was passed. To use it, pass the manifest")
    root = music if music.is_dir() else music.parent
    tracks = []
    for path, entry, where in entries:
        captions = pop_captions(entry, where)
        attributes = entry.pop("attributes", None) or {}
        options = pop_options(entry, where)
        stem = entry.pop("melody_from", None)
        stem = (path.parent if music.is_dir() else root) / str(stem) if stem else path
        if not stem.is_file() and stem != path:
            raise UserError(f"{where}: melody_from {stem}: no such file")
        track = dict(path=str(path), melody_from=str(stem), name=os.path.relpath(path, root),
                     caption=captions[0] if captions else "",
                     metadata=clean_metadata({**entry, **attributes}), **options)  # fmt: skip
        if group_by:
            track.setdefault("group", group_of(track["name"], group_by))
        tracks.append(track | ({"captions": captions} if len(captions) > 1 else {}))
    if not tracks:
        raise UserError(f"{music}: contains no audio files ({', '.join(sorted(SUFFIXES))})")
    name, times = Counter(track["name"] for track in tracks).most_common(1)[0]
    if times > 1:
        raise UserError(f"{music}: lists {name} more than once. List each track once")
    return tracks


def read_folder(folder):
    """Yield (path, entry, where) of each audio file. where: the file to name in an error message."""
    hidden = []
    files = sorted(files_under(folder, hidden))
    tracks = [path for path in files if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES]
    sidecars = match_sidecars(tracks, files)
    if hidden:
        print(f"hidden or of the system, so not searched: {len(hidden)}, for example {hidden[0]}")
    used = {text for texts in sidecars.values() for text in texts} | {folder / name for name in MANIFESTS}
    unused = [os.path.relpath(path, folder) for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    unused = [name for name in unused if folder / name not in used]
    if tracks and unused:
        names = ", ".join(unused[:20]) + f" and {len(unused) - 20} more" * (len(unused) > 20)
        print(f"text files that are not used: {names}. A caption is NAME.txt or NAME.json next to NAME.wav. Write a"
              f" table as a manifest, {MANIFEST_LINE} per line, and pass it instead of the folder")  # fmt: skip
    for path, entry in zip(tracks, read_sidecars(tracks, sidecars)):
        yield path, entry, path.with_suffix(".json")


def files_under(folder, hidden):
    """Yield every file in a folder, its subfolders and symbolic links to folders, each once.

    Hidden files and folders and those of operating systems are left out and added to the list `hidden`.
    """

    def fail(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}). Make it readable, or move it away")

    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        skipped = [name for name in folders + files if name.startswith(".") or name in SYSTEM_FOLDERS]
        hidden += [os.path.join(root, name) for name in skipped]
        folders[:] = set(folders) - set(skipped)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(root, name)), name))  # folders before links to them
        visited.add(os.path.realpath(root))
        yield from (Path(root, name) for name in files if name not in skipped)


def match_sidecars(tracks, files):
    """Return {track: its text files among `files`}: NAME.json or NAME.wav.json, then NAME.txt or NAME.wav.txt.

    Names may differ in case and Unicode normalization, unless the text belongs to another track.
    """
    texts = {path for path in sorted(files) if path.suffix.lower() in (".json", ".txt") and path.is_file()}
    sidecars = {track: {} for track in tracks}
    for key in (lambda path: path, lambda path: (path.parent, unicodedata.normalize("NFC", path.name).casefold())):
        by_key = {key(path): path for path in sorted(texts, reverse=True)}
        for track in tracks:
            for suffix in sidecars[track].keys() ^ {".json", ".txt"}:
                names = (track.with_suffix(suffix), track.with_name(track.name + suffix))
                if match := next((by_key[key(name)] for name in names if key(name) in by_key), None):
                    sidecars[track][suffix] = match
        texts -= {path for matches in sidecars.values() for path in matches.values()}
    return {track: [matches[suffix] for suffix in sorted(matches)] for track, matches in sidecars.items()}


def read_sidecars(tracks, sidecars):
    """Return the entry of each track. NAME.txt overrides the caption of NAME.json.

    sidecars: from `match_sidecars`. Raises one UserError that names all files that cannot be used.
    """
    entries, errors, undecodable = [], [], defaultdict(list)
    for track in tracks:
        entries.append({})
        for path in sidecars[track]:
            try:
                text = read_text(path)
                if path.suffix.lower() == ".json":
                    entries[-1] = parse_entry(text, path)
                elif (caption := clean_text(text)) and not is_missing(caption):
                    entries[-1]["caption"] = caption
            except EncodingError as error:
                undecodable[error.encoding].append(path)
            except UserError as error:
                errors.append(str(error))
    errors += [convert_line(paths, encoding) for encoding, paths in undecodable.items()]
    if errors:
        raise UserError("; ".join(errors))
    return entries


def convert_line(paths, encoding):
    """Return an error message for text files, with the shell command that converts them to UTF-8."""
    command = f'iconv -f {encoding} -t UTF-8 "$f" > "$f.new" && mv "$f.new" "$f"'
    return (f"text files that are not UTF-8 but probably {encoding}: {len(paths)}. Save them as UTF-8, for example"
            f" with: for f in {quote(*paths)}; do {command}; done")  # fmt: skip


def read_manifest(manifest):
    """Yield (path, entry, where) of each line {"path", "caption", ...}. Lines without text use sidecars.

    Paths are relative to the manifest or, as in audiocraft, to the working directory.
    """
    try:
        lines = read_text(manifest).split("\n")
    except EncodingError as error:
        if manifest.suffix.lower() in TEXT_SUFFIXES:
            raise UserError(convert_line([manifest], error.encoding)) from None
        raise UserError(f"{manifest}: neither a folder of audio nor a JSONL manifest. Pass the folder") from None
    except UserError:
        raise UserError(f"{manifest}: neither a folder of audio nor a JSONL manifest. Pass the folder") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        entry = parse_entry(line, where, MANIFEST_LINE)
        if not isinstance(name := entry.pop("path", None), str):
            raise UserError(f'{where}: has no "path". Write {MANIFEST_LINE}')
        path = manifest.parent / name
        if not path.is_file() and Path(name).is_file():
            path = Path(name)
        if not path.is_file():
            raise UserError(f"{where}: {path}: no such file")
        entries.append((path, entry, where))
    no_text = dict.fromkeys(("melody_from", "split", "group"))
    tracks = {path: None for path, entry, _ in entries if not clean_metadata({**entry, **no_text})}
    files = [path for folder in {path.parent: None for path in tracks} for path in folder.iterdir()]
    sidecars = dict(zip(tracks, read_sidecars(tracks, match_sidecars(tracks, files))))
    for path, entry, where in entries:
        yield path, {**sidecars.get(path, {}), **entry}, where


def parse_entry(text, where, example='{"caption": "...", "genre": "jazz"}'):
    """Parse the JSON object of a sidecar or a manifest's line."""
    try:
        entry = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity, which are not JSON
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}). Write one object: {example}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object, {example}")
    if not isinstance(entry.get("attributes") or {}, dict):
        raise UserError(f'{where}: "attributes" must be an object, {{"genre": "jazz"}}')
    return entry


class EncodingError(UserError):
    """A file is not text in UTF-8. encoding: a guess, as iconv names it."""

    def __init__(self, path, content):
        super().__init__(f"{path}: not UTF-8 text. Save it as UTF-8")
        zeros = content[1::2].count(0), content[::2].count(0)
        self.encoding = "WINDOWS-1252" if not max(zeros) else "UTF-16LE" if zeros[0] > zeros[1] else "UTF-16BE"


def read_text(path):
    """Read a text file, optionally gzipped. Raises UserError unless it is UTF-8, or UTF-16 with a byte-order mark."""
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
        raise EncodingError(path, content)
    return text


def is_missing(value):
    """Return whether a value of an entry stands for no value, such as "NaN"."""
    return value in (None, "") or str(value).strip().lower() in MISSING


def pop_options(entry, where):
    """Remove "split" and "group" from an entry and return those that have a value."""
    split, group = entry.pop("split", None), entry.pop("group", None)
    if not is_missing(split) and str(split).lower() not in SPLITS:
        raise UserError(f'{where}: "split" must be "train" or "valid", not {split!r}. Change it, or remove the entry')
    options = {} if is_missing(split) else {"split": SPLITS[str(split).lower()]}
    return options if is_missing(group) else {**options, "group": str(group).encode(errors="replace").decode()}


def pop_captions(entry, where):
    """Remove "caption" and audiocraft's "description" from an entry and return its captions, without empty ones."""
    captions = []
    for value in (entry.pop("caption", None), entry.pop("description", None)):
        texts = [text for text in (value if isinstance(value, list) else [value]) if text and not is_missing(text)]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f'{where}: "caption" must be text, or a list of texts, not {texts[0]!r}')
        captions = captions or [text for text in map(clean_text, texts) if text]
    return captions


def clean_metadata(entry):
    """Return the texts and numbers of an entry. Lists become text; null, empty and nested values are dropped."""
    metadata = {}
    for key, value in entry.items():
        if isinstance(value, list):
            parts = (part for part in value if isinstance(part, (str, int, float)) and not is_missing(part))
            value = ", ".join(map(str, parts))
        name, value = clean_text(key), clean_text(value) if isinstance(value, str) else value
        is_value = isinstance(value, (str, int, float)) and not is_missing(value)
        if is_value and name and key not in NOT_METADATA:
            metadata[name] = value
    return metadata


def add_metadata(track, tags, analysis):
    """Return an uncaptioned track with metadata from tags, folder names, and the estimated tempo and key.

    analysis: from `analyse_track`. "measured" of the track lists which of tempo and key are estimates.
    """
    folder, key, measured = folder_words(track["name"]), analysis["key"], []
    metadata = tags | ({"folder": folder} if folder else {})
    tempo = parse_bpm(metadata.pop("bpm", ""))
    if not tempo and analysis["tempo"]:
        tempo = analysis["tempo"]
        measured.append("tempo")
    if tempo:
        bpm = 5 * round(tempo / 5)
        metadata["tempo"] = f"{'slow' if bpm < 85 else 'medium' if bpm < 125 else 'fast'}, {bpm} bpm"
    if key >= 0 and "key" not in metadata:
        metadata["key"] = KEYS[key]
        measured.append("key")
    return {**track, "metadata": metadata, "measured": measured}


def read_tags(path, names):
    """Read the tags called `names` of an audio file: {name: text}, in this order. Unreadable tags are skipped."""
    if not names:
        return {}
    libsndfile_tags, tags = {}, None
    with contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(os.fsencode(path)) as file:
        libsndfile_tags = file.copy_metadata()
    with contextlib.suppress(mutagen.MutagenError, OSError), open(path, "rb") as file:
        tags = getattr(mutagen.File(file), "tags", None)
    texts_by_name = {}
    for name in names:
        frame, atom, *keys = TAGS[name]
        if hasattr(tags, "getall"):  # ID3
            frames = [tag for tag in tags.getall(frame) if not getattr(tag, "desc", "")]
            texts = [text for tag in frames for text in (tag.genres if frame == "TCON" else map(str, tag.text))]
        elif isinstance(tags, mutagen.mp4.MP4Tags):
            texts = [
                value.decode(errors="replace") if isinstance(value, bytes) else str(value)
                for value in tags.get(atom, [])
            ]
        else:
            texts = [text for key in keys for text in (tags or {}).get(key, [])]
        text = clean_text(", ".join(texts) or libsndfile_tags.get(keys[0], ""))
        if text != "0" and not is_missing(text):
            texts_by_name[name] = text
    return texts_by_name


def folder_words(name):
    """Return the folders of a track as text: 'jazz_trio/slow/007/01.mp3' -> 'jazz trio, slow'. Numbers are dropped."""
    folders = Path(name).parts[:-1]
    folders = folders[-1:] if ".." in folders else folders  # outside the manifest's folder, only the last folder counts
    texts = (folder.replace("_", " ").strip() for folder in folders)
    return clean_text(", ".join(text for text in texts if any(map(str.isalpha, text))))


def parse_bpm(tag):
    """Return the beats per minute in a tag's text, or 0."""
    match = re.fullmatch(r"(\d{2,3})([.,]\d+)?( ?bpm)?", tag.strip().lower())
    return float(match[1]) if match else 0.0


def train_tokenizer(tracks, vocab_size):
    """Train SentencePiece (BPE, case-folded, byte fallback) on captions and metadata. Return the model's bytes."""
    if not 300 <= vocab_size <= 1_000_000:
        raise UserError(f"--vocab_size {vocab_size}: must be between 300 and 1,000,000, because 256 pieces are bytes")
    sentences = [caption for track in tracks for caption in captions_of(track) if caption]
    sentences += sorted({f"{key}: {value}" for track in tracks for key, value in track["metadata"].items()})
    folded = [unicodedata.normalize("NFKC", sentence).casefold() for sentence in sentences]
    letters = Counter("".join(folded))
    if len(letters) > (limit := (vocab_size - 259) // 2):  # leave room for words: rare letters become bytes
        frequent = {letter for letter, _ in letters.most_common(limit)}
        sentences = ["".join(letter if letter in frequent else " " for letter in sentence) for sentence in folded]
    sentences = [sentence for sentence in sentences if sentence.strip()] or ["music"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", normalization_rule_name="nmt_nfkc_cf", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, max_sentence_length=2**30,
    )  # fmt: skip
    return model.getvalue()
