"""Print the results of metrics.py as tables. `evaluate` in metrics.py describes the keys of a result."""

import numpy as np

TITLES = {
    "fad": "Fréchet distance of codec latents",
    "fad_real": "  of real music",
    "chroma": "chroma similarity to held-out music",
    "chroma_chance": "  by chance",
    "copied": "share of copies of training music",
    "copied_real": "  of real music",
    "rtf": "real-time factor",
}


def cell(values):
    """Return a number, or mean ± standard error of several numbers."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{error}"


def add_ratio(row):
    """Add the ratio of the first generated clips' score to that of real music."""
    guided = [*row][2]  # after chance and real
    return row | {f"{guided} / real": row[guided] / row["real"] if row["real"] else 0.0}


def print_results(results):
    """Print the result of one run, or mean and standard error over several runs, for example of several seeds."""
    clips, melodies = results[0]["clips"], [result["melody"] for result in results]
    runs = f"mean and standard error over {len(results)} runs, " if len(results) > 1 else ""
    print(f"\n{runs}{clips} clips generated for held-out conditions")
    for key, title in TITLES.items():
        values = [result[key] for result in results]
        if None not in values:
            print(f"{title:36}{cell(values):>15}")
    columns = {name: [add_ratio(result["adherence"][name]) for result in results] for name in results[0]["adherence"]
               if all(name in result["adherence"] for result in results)}  # runs may differ in their data  # fmt: skip
    if columns:
        print("\nadherence: share of clips in which a probe detects the attribute of the conditions")
        print(f"standard error of a share from {clips} clips: at most {0.5 / clips**0.5:.2f}")
    elif not results[0].get("withheld"):
        print("caption adherence: not measured, because no attribute has 2 to 7 values")
    if all(melodies):
        print("melody: chroma similarity to the melody of the conditions; shuffled: to another clip's melody")
        for key, title in (("own", "melody"), ("shuffled", "shuffled")):
            columns[title] = [{name: row[key] for name, row in melody.items()} for melody in melodies]
    if columns:
        print(" " * 18 + "".join(f"{title:>15}" for title in columns))
    for name in dict.fromkeys(name for column in columns.values() for row in column for name in row):
        cells = [cell([row[name] for row in column]) if all(name in row for row in column) else ""
                 for column in columns.values()]  # runs may differ in their guidance  # fmt: skip
        if any(cells):
            print(f"{name:18}" + "".join(f"{text:>15}" for text in cells))
    print("\n".join(dict.fromkeys(result["withheld"] for result in results if result["withheld"])))
