"""Radiologists' reports of torsos: composed from what is true, and read back.

A report is one line of lower-case words. Sentences end in a point, and blanks stand around it:
"there is a small nodule in the left upper lobe . the heart is normal in size ." Left and right are
those of the patient.
"""

import re

UNKNOWN = "unknown"     # what a report tells, but not clearly

# Every entry of a list says the same in other words.
LESION = ("there is a {size} {thing} in the {side} {zone}",
          "a {size} {thing} is seen in the {side} {zone}",
          "the {side} {zone} contains a {size} {thing}",
          "within the {side} {zone} we find a {size} {thing}",
          "the {side} lung shows a {size} {thing} in its {part}",
          "{size} {thing} located in the {part} of the {side} lung")
THINGS = {"small": ("nodule", "lesion", "focus", "opacity"),
          "large": ("mass", "lesion", "tumor", "opacity")}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "bulky", "sizable")}
ZONES = {"upper": ("upper lobe", "upper zone", "upper field"),
         "lower": ("lower lobe", "lower zone", "lung base")}
PARTS = {"upper": ("upper part", "upper third", "apical region"),
         "lower": ("lower part", "lower third", "basal region")}
NO_LESION = ("no nodule or mass is seen",
             "there is no focal opacity",
             "the lungs are clear",
             "both lungs are free of focal lesions",
             "neither nodule nor mass can be detected",
             "the pulmonary parenchyma is without suspicious lesion")
EFFUSION = ("there is a {side} pleural effusion",
            "a pleural effusion is present on the {side}",
            "fluid has collected in the {side} pleural space",
            "the {side} costophrenic angle is blunted by fluid",
            "{side} sided pleural effusion",
            "pleural fluid layers along the {side} chest wall")
NO_EFFUSION = ("no pleural effusion is seen",
               "there is no pleural fluid",
               "both costophrenic angles are sharp",
               "the pleural spaces are free of fluid",
               "effusion is absent on either side",
               "no fluid surrounds the lungs")
HEART = {"normal": ("the heart is normal in size",
                    "heart size is normal",
                    "the cardiac silhouette is within normal limits",
                    "the heart is not enlarged",
                    "there is no cardiomegaly",
                    "cardiac dimensions are regular"),
         "enlarged": ("the heart is enlarged",
                      "there is cardiomegaly",
                      "the cardiac silhouette is widened",
                      "heart size is increased",
                      "the heart is larger than normal",
                      "enlargement of the heart is evident")}
# Sentences about what is normal in everybody. A report has at most one of each row.
OTHERS = (("the bones are intact", "no rib fracture is visible", "bony thorax appears unremarkable",
           "visualized osseous structures show nothing acute", "ribs and spine look healthy"),
          ("mediastinal contours are preserved", "the mediastinum lies centrally",
           "hilar structures have an ordinary appearance", "the hila keep their usual shape"),
          ("the trachea is midline", "central airways remain patent",
           "large bronchi branch as expected"),
          ("no pneumothorax is identified", "there is no evidence of pneumothorax",
           "pneumothorax was not demonstrated"),
          ("soft tissues are unremarkable", "subcutaneous fat looks even",
           "muscles of the shoulder girdle are symmetric"),
          ("the diaphragm is smooth", "both hemidiaphragms are well defined",
           "liver and stomach lie at their expected level"),
          ("pulmonary vessels taper gradually", "the thoracic aorta follows its regular course",
           "vascular markings do not suggest congestion", "there are no signs of edema"),
          ("image quality is adequate", "the examination was performed in deep inspiration",
           "no previous study is available for comparison", "positioning is straight",
           "this patient had one examination today"))
LEFT_OUT = 0.2          # how often a normal sentence about lesion, effusion or heart is left out

LESION_WORDS = {"nodule", "nodules", "mass", "masses", "lesion", "lesions", "focus", "opacity",
                "opacities", "tumor", "tumors"}
EFFUSION_WORDS = {"effusion", "effusions", "fluid", "blunted"}
HEART_WORDS = {"heart", "cardiac", "cardiomegaly"}
LARGE_HEART_WORDS = {"enlarged", "enlargement", "cardiomegaly", "widened", "increased", "larger"}
NORMAL_HEART_WORDS = {"normal", "regular"}
DENIALS = {"no", "not", "without", "neither", "nor", "free", "absent"}
SIDE_WORDS = {"left": {"left"}, "right": {"right"}}
ZONE_WORDS = {"upper": {"upper", "apical"}, "lower": {"lower", "base", "basal"}}
SIZE_WORDS = {size: set(words) for size, words in SIZES.items()}


def pick(rng, sentences):
    """Draw one of several sentences or words."""
    return sentences[rng.integers(len(sentences))]


def compose(rng, findings):
    """Write the report of a subject -> str.

    findings: A dict with lesion, effusion and heart, see findings_in. It may hold more.
    """
    sentences = []
    lesion = findings["lesion"]
    if lesion:
        size = lesion["size"]
        sentence = pick(rng, LESION)
        sentences.append(sentence.format(size=pick(rng, SIZES[size]), side=lesion["side"],
                                         thing=pick(rng, THINGS[size]),
                                         zone=pick(rng, ZONES[lesion["zone"]]),
                                         part=pick(rng, PARTS[lesion["zone"]])))
    elif rng.random() >= LEFT_OUT:
        sentences.append(pick(rng, NO_LESION))
    if findings["effusion"]:
        sentences.append(pick(rng, EFFUSION).format(side=findings["effusion"]))
    elif rng.random() >= LEFT_OUT:
        sentences.append(pick(rng, NO_EFFUSION))
    if findings["heart"] == "enlarged" or rng.random() >= LEFT_OUT:
        sentences.append(pick(rng, HEART[findings["heart"]]))
    others = rng.permutation(len(OTHERS))
    for k in others[:max(2 - len(sentences), 0) + rng.integers(2)]:
        sentences.append(pick(rng, OTHERS[k]))
    rng.shuffle(sentences)
    return " . ".join(sentences) + " ."


def which_of(words, groups):
    """The name of the only group {name: its words} that has one of the words, else UNKNOWN."""
    named = [name for name, group in groups.items() if group & words]
    return named[0] if len(named) == 1 else UNKNOWN


def findings_in(report):
    """What a report says, read sentence by sentence -> {"lesion", "effusion", "heart"}.

    lesion: {"side", "zone", "size"}: "left" or "right" of the patient, "upper" or "lower", "small"
        or "large". None if the report denies a lesion or does not speak of one.
    effusion: The side, or None as for the lesion.
    heart: "normal" or "enlarged", or None if the report does not tell.

    A side, zone or size that is told twice in different ways, or not at all, is UNKNOWN. If two
    sentences speak of the same finding, the first one that affirms it counts, and for the heart
    the first one. Any text can be read: words that say nothing are passed over.
    """
    found = {"lesion": None, "effusion": None, "heart": None}
    for sentence in str(report).lower().split("."):
        words = set(re.findall("[a-z]+", sentence))
        denied = bool(words & DENIALS)
        side = which_of(words, SIDE_WORDS)
        if words & LESION_WORDS and not denied and found["lesion"] is None:
            found["lesion"] = {"side": side, "zone": which_of(words, ZONE_WORDS),
                               "size": which_of(words, SIZE_WORDS)}
        if words & EFFUSION_WORDS and not denied and found["effusion"] is None:
            found["effusion"] = side
        if words & HEART_WORDS and found["heart"] is None:
            if words & LARGE_HEART_WORDS:
                found["heart"] = "normal" if denied else "enlarged"
            elif words & NORMAL_HEART_WORDS:
                found["heart"] = "normal"
    return found
