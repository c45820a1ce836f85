"""The JSON files of BIDS, which we call sidecars, and how their keys become a record.

Sidecars hold for the images below them (the inheritance of BIDS), see Sidecars.of. BIDS gives times
in seconds. A record has them in ms, see records.py.
"""

import json

from data.layouts.records import (
    age_of,
    number_of,
    sex_of,
    text_of,
    tracer_of,
    vendor_of,
)
from data.layouts.words import few

# Field of a record in ms -> its keys, the best first, and a limit. BIDS gives seconds. A number
# above the limit cannot be in seconds. It is taken as ms, because many sets have ms.
TIMES = {"TR": (("RepetitionTime", "RepetitionTimePreparation", "RepetitionTimeExcitation"), 60),
         "TE": (("EchoTime",), 2),
         "TI": (("InversionTime",), 20)}
# Field of a record -> its keys, the best first. BIDS has no key for the voltage of a CT.
NUMBER_KEYS = {"field": ("MagneticFieldStrength",), "FA": ("FlipAngle",),
               "kvp": ("KVP", "TubeVoltage", "XRayTubeVoltage"), "ma": ("XRayTubeCurrent",),
               "mas": ("XRayExposure",)}
TEXT_KEYS = {"model": "ManufacturersModelName", "kernel": "ConvolutionKernel",
             "recon": "ReconMethodName"}
# MBq per unit of dose. The letter micro has two codes.
DOSE_UNITS = {"bq": 1e-6, "kbq": 1e-3, "mbq": 1, "gbq": 1e3, "mci": 37, "uci": 0.037,
              "\u00b5ci": 0.037, "\u03bcci": 0.037}
MOST_MBQ = 5000         # a dose without unit is in MBq below this, otherwise in Bq
GAUSS = 100             # a field above this is in gauss, of which 10 000 are a tesla


def parse(path):
    """The name of a file in BIDS: sub-01_run-2_T1w.json -> ({"sub": "01", "run": "2"}, "T1w").

    The pairs are called entities, and the last word is the suffix.
    """
    *pairs, suffix = path.name.split(".")[0].split("_")
    entities = {}
    for pair in pairs:
        key, _, value = pair.partition("-")
        entities[key] = value
    return entities, suffix


class Sidecars:
    """The JSON files of one data set. Each is read once, when it is needed."""

    def __init__(self, root):
        self.root = root
        self.listed = {}                # folder -> its JSON files
        self.contents = {}              # path of a JSON file -> dict
        self.damaged = []               # names of JSON files
        self.rivals = []                # sentences

    def of(self, path, place):
        """All that the sidecars say of an image -> {key: value}.

        A sidecar holds for an image if it lies in the image's folder or above, has the same suffix,
        and all its entities are in the image's name. Lower sidecars override single keys of higher
        ones, and cannot unset a key. The entities that a derivative adds to a name (space, desc)
        do not matter here, because the sidecars of a raw data set do not have them.

        path: The image. place: Its folder as a relative path, from the root of the data set.
        """
        entities, suffix = parse(path)
        known = {}
        for folder in [*reversed(place.parents), place]:
            fitting = []
            for sidecar in self._in(self.root / folder):
                own, own_suffix = parse(sidecar)
                if own_suffix == suffix and own.items() <= entities.items():
                    fitting.append((-len(own), sidecar))        # the most entities come first
            fitting = [sidecar for _, sidecar in sorted(fitting)]
            if len(fitting) > 1:
                self.rivals.append(f"{fitting[0].name} is used, not {fitting[1].name}")
            if fitting:
                said = self._read(fitting[0])
                known.update({key: value for key, value in said.items() if value is not None})
        return known

    def notes(self):
        """Sentences for the user."""
        found = []
        if self.damaged:
            found.append(f"{len(self.damaged)} JSON files cannot be read and are not used: "
                         f"{few(self.damaged)}")
        if self.rivals:
            found.append("BIDS allows one JSON file per folder to hold for a scan, here are two "
                         f"for {len(self.rivals)} scans: e.g. {self.rivals[0]}")
        return found

    def _in(self, folder):
        """The JSON files of a folder, which need not exist."""
        if folder not in self.listed:
            self.listed[folder] = sorted(folder.glob("*.json"))
        return self.listed[folder]

    def _read(self, sidecar):
        if sidecar not in self.contents:
            self.contents[sidecar] = {}
            try:
                self.contents[sidecar].update(json.loads(sidecar.read_text(encoding="utf-8-sig")))
            except (OSError, ValueError, TypeError):
                self.damaged.append(sidecar.name)
        return self.contents[sidecar]


def record_from(known, entities, say):
    """The record of a scan without its voxel and tracer. Unknown facts are absent.

    known: What the sidecars say of the scan. entities: Those of its name.
    say: A function that gets a sentence about an oddity.
    """
    record = {"age": age_of(known.get("PatientAge")), "sex": sex_of(known.get("PatientSex")),
              "vendor": vendor_of(known.get("Manufacturer"))}
    for field, key in TEXT_KEYS.items():
        record[field] = text_of(known.get(key))
    for field, keys in NUMBER_KEYS.items():
        record[field] = _first_positive(known, keys)
    if record["field"] and record["field"] > GAUSS:
        record["field"] /= 1e4
    for field, (keys, most_seconds) in TIMES.items():
        time = _first_positive(known, keys)
        if time and time > most_seconds:
            say(f"{field} is above {most_seconds}, so it is taken as ms and not as s")
        elif time:
            time = round(1000 * time, 6)
        record[field] = time
    record["agent"] = text_of(known.get("ContrastBolusIngredient")) or text_of(entities.get("ce"))
    record["dose"] = _dose(known)
    record["start"] = number_of(known.get("FrameTimesStart"))
    record["duration"] = sum(durations(known)) or None
    return {field: value for field, value in record.items() if value is not None}


def _first_positive(known, keys):
    """The first positive number under one of the keys, or None."""
    for key in keys:
        number = number_of(known.get(key))
        if number is not None and number > 0:
            return number
    return None


def _dose(known):
    """The dose in MBq, or None."""
    dose = _first_positive(known, ("InjectedRadioactivity",))
    if dose is None:
        return None
    default = "MBq" if dose < MOST_MBQ else "Bq"
    unit = text_of(known.get("InjectedRadioactivityUnits")) or default
    if unit.lower() not in DOSE_UNITS:
        return None
    return round(dose * DOSE_UNITS[unit.lower()], 6)


def durations(known):
    """The durations of the frames of a PET in s, or () if one of them is not known."""
    said = known.get("FrameDuration")
    found = []
    for value in said if isinstance(said, list) else [said]:
        seconds = number_of(value)
        if seconds is None or seconds <= 0:
            return ()
        found.append(seconds)
    return tuple(found)


def tracer_from(known, entities):
    """The tracer of a PET -> (name, contrast); the name is None if it is not told.

    Some converters write the tracer into the entity acq. An unknown word there is no tracer.
    """
    said = []
    for value in (known.get("TracerName"), entities.get("trc"), known.get("Radiopharmaceutical")):
        said.append(tracer_of(value))
    for name, contrast in [*said, tracer_of(entities.get("acq"))]:
        if contrast != "pet":
            return name, contrast
    for name, contrast in said:
        if name:
            return name, contrast
    return None, "pet"
