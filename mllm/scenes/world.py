"""The factors of a scene, how scenes are drawn from them, and one-factor hard negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

#: Values in the order of the defaults; a world takes a prefix or any subset of them.
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "heart", "diamond", "ring")
COLORS = (
    "red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "orange", "purple", "pink",
)  # fmt: skip
BACKGROUNDS = ("plain", "grass", "sand", "night", "paper", "sky")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
LETTERS = "ABEFHKLMNPRSTXYZ"

#: Diameters as a share of the image's side.
_MAIN_DIAMETER = {"small": (0.24, 0.32), "large": (0.40, 0.54)}
_LONE_SMALL_DIAMETER = (0.15, 0.32)  # alone, nothing can be mistaken for the main object
_COMPANION_DIAMETER = (0.15, 0.19)
_LETTER_RADIUS = 0.12
_CELL_CENTERS = (0.19, 0.50, 0.81)

#: Factors that :meth:`SceneWorld.hard_negative` can change, the strong ones first.
FACTORS = (
    "shape", "color", "background",
    "size", "texture", "place",
    "companion shape", "companion color", "companion place", "count", "letter",
)  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One object.  ``x``, ``y`` (center) and ``diameter`` are shares of the image's side."""

    shape: str
    color: str
    size: str
    texture: str
    place: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Scene:
    """A main object, zero to three small companions, a background and perhaps one letter.

    ``nuisance`` seeds what no caption mentions (tints, phases of textures), so that two scenes that
    differ in one factor are rendered alike in all else.
    """

    background: str
    main: SceneObject
    companions: tuple[SceneObject, ...]
    letter: str | None
    letter_place: str | None
    nuisance: int

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return (self.main, *self.companions)


@dataclass(frozen=True)
class SceneWorld:
    """Which values every factor has, hence how many strong and how many fine combinations.

    Shape-color pairs in :attr:`held_out_pairs` occur in the compositional split only, where the
    main object is always one of them.
    """

    shapes: Sequence[str] = SHAPES[:6]
    colors: Sequence[str] = COLORS[:8]
    backgrounds: Sequence[str] = BACKGROUNDS[:4]
    textures: Sequence[str] = TEXTURES
    sizes: Sequence[str] = SIZES
    places: Sequence[str] = PLACES
    letters: str = LETTERS[:8]
    max_companions: int = 3
    letter_probability: float = 0.5
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        known = {
            "shapes": SHAPES, "colors": COLORS, "backgrounds": BACKGROUNDS,
            "textures": TEXTURES, "sizes": SIZES, "places": PLACES, "letters": LETTERS,
        }  # fmt: skip
        for name, values in known.items():
            mine = getattr(self, name)
            unknown = [value for value in mine if value not in values]
            if unknown or not mine:
                raise ValueError(f"scenes: {name} must be some of {list(values)}, not {list(mine)}")
        if not 0 <= self.max_companions <= 3:
            raise ValueError(f"scenes: max_companions must be 0 to 3, not {self.max_companions}")
        for name in ("letter_probability", "held_out_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"scenes: {name} must be 0 to 1, not {getattr(self, name)}")

    @property
    def num_strong_combinations(self) -> int:
        """How many themes there are: background x shape and color of the main object."""
        return len(self.shapes) * len(self.colors) * len(self.backgrounds)

    @property
    def num_fine_combinations(self) -> int:
        """How many pictures a theme has, as far as a detailed caption tells them apart."""
        kinds = len(self.shapes) * len(self.colors)
        free = len(self.places) - 1
        companions = sum(
            math.comb(free, n) * kinds**n if n else 1 for n in range(self.max_companions + 1)
        )
        letters = len(self.letters) + 1
        main = len(self.sizes) * len(self.textures) * len(self.places)
        return main * companions * letters

    @cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """Shape-color pairs kept for the compositional split; every value is seen in some other."""
        pairs = list(product(self.shapes, self.colors))
        count = round(len(pairs) * self.held_out_share)
        seen, held_out = set(pairs), set[tuple[str, str]]()
        for i in np.random.default_rng(0).permutation(len(pairs)):
            rest = seen - {pairs[i]}
            known = {shape for shape, _ in rest}, {color for _, color in rest}
            if len(held_out) < count and known == (set(self.shapes), set(self.colors)):
                held_out.add(pairs[i])
                seen = rest
        return frozenset(held_out)

    def sample(self, rng: np.random.Generator, *, held_out: bool = False) -> Scene:
        """Draw one scene; with ``held_out`` its main object is one of the held-out pairs."""
        pairs = sorted(self.held_out_pairs) if held_out else self._seen_pairs
        assert pairs, "no shape-color pair is held out"
        shape, color = pairs[rng.integers(len(pairs))]
        size = str(rng.choice(list(self.sizes)))
        num_companions = int(rng.integers(self.max_companions + 1))
        lone_small = num_companions == 0 and size == "small"
        diameters = _LONE_SMALL_DIAMETER if lone_small else _MAIN_DIAMETER[size]
        main = _place_object(
            rng,
            shape=shape,
            color=color,
            size=size,
            texture=self._sample_texture(rng),
            place=str(rng.choice(list(self.places))),
            diameter=float(rng.uniform(*diameters)),
        )
        companions = self._sample_companions(rng, main, num_companions)
        taken = (main, *companions)
        letter = letter_place = None
        free = self._free_places(taken, _LETTER_RADIUS)
        if free and rng.random() < self.letter_probability:
            letter = str(rng.choice(list(self.letters)))
            letter_place = str(rng.choice(free))
        return Scene(
            background=str(rng.choice(list(self.backgrounds))),
            main=main,
            companions=companions,
            letter=letter,
            letter_place=letter_place,
            nuisance=int(rng.integers(2**31)),
        )

    def hard_negative(self, scene: Scene, factor: str, rng: np.random.Generator) -> Scene | None:
        """Return ``scene`` with just ``factor`` changed, or None where it has no such factor.

        Raises:
            ValueError: ``factor`` is not one of :data:`FACTORS`.
        """
        if factor not in FACTORS:
            raise ValueError(f"scenes: unknown factor {factor!r}; one of {list(FACTORS)}")
        main = scene.main
        if factor == "shape":
            value = _another(rng, self._seen_shapes(main.color), main.shape)
            return replace(scene, main=replace(main, shape=value)) if value else None
        if factor == "color":
            value = _another(rng, self._seen_colors(main.shape), main.color)
            return replace(scene, main=replace(main, color=value)) if value else None
        if factor == "background":
            value = _another(rng, self.backgrounds, scene.background)
            return replace(scene, background=value) if value else None
        if factor == "size":
            return self._resize_main(scene, rng)
        if factor == "texture":
            value = _another(rng, self.textures, main.texture)
            return replace(scene, main=replace(main, texture=value)) if value else None
        if factor == "place":
            return self._move_main(scene, rng)
        if factor == "letter":
            value = _another(rng, list(self.letters), scene.letter) if scene.letter else None
            return replace(scene, letter=value) if value else None
        return self._change_companion(scene, factor, rng)

    @cached_property
    def _seen_pairs(self) -> list[tuple[str, str]]:
        held_out = self.held_out_pairs
        return [pair for pair in product(self.shapes, self.colors) if pair not in held_out]

    def _seen_shapes(self, color: str) -> list[str]:
        return [shape for shape, seen_color in self._seen_pairs if seen_color == color]

    def _seen_colors(self, shape: str) -> list[str]:
        return [color for seen_shape, color in self._seen_pairs if seen_shape == shape]

    def _sample_texture(self, rng: np.random.Generator) -> str:
        """Solid in half of the scenes, where there is a choice: most things are of one color."""
        if "solid" in self.textures and rng.random() < 0.5:
            return "solid"
        return str(rng.choice(list(self.textures)))

    def _sample_companions(
        self, rng: np.random.Generator, main: SceneObject, count: int
    ) -> tuple[SceneObject, ...]:
        alike = rng.random() < 0.5  # "two blue circles" rather than two different things
        pairs = self._seen_pairs
        kind = pairs[rng.integers(len(pairs))]
        companions: list[SceneObject] = []
        for _ in range(count):
            if not alike:
                kind = pairs[rng.integers(len(pairs))]
            companion = self._add_companion(rng, (main, *companions), kind)
            if companion is not None:
                companions.append(companion)
        return tuple(companions)

    def _add_companion(
        self,
        rng: np.random.Generator,
        taken: Sequence[SceneObject],
        kind: tuple[str, str],
        letter_place: str | None = None,
    ) -> SceneObject | None:
        diameter = float(rng.uniform(*_COMPANION_DIAMETER))
        free = self._free_places(taken, diameter / 2, letter_place)
        if not free:
            return None
        return _place_object(
            rng,
            shape=kind[0],
            color=kind[1],
            size="small",
            texture="solid",
            place=str(rng.choice(free)),
            diameter=diameter,
        )

    def _free_places(
        self, taken: Sequence[SceneObject], radius: float, letter_place: str | None = None
    ) -> list[str]:
        """Places whose cell neither an object nor the letter occupies or reaches into."""

        def is_free(place: str) -> bool:
            occupied = (letter_place, *(other.place for other in taken))
            center = _inside(_cell_center(place), radius)
            return place not in occupied and _is_clear(center, radius, taken, letter_place)

        return [place for place in self.places if is_free(place)]

    def _resize_main(self, scene: Scene, rng: np.random.Generator) -> Scene | None:
        """Grow or shrink the main object about its center, as far as the picture's edge allows."""
        main = scene.main
        size = _another(rng, self.sizes, main.size)
        if size is None:
            return None
        diameter = float(rng.uniform(*_MAIN_DIAMETER[size]))
        x, y = _inside((main.x, main.y), diameter / 2)
        grows = diameter > main.diameter
        if grows and not _is_clear((x, y), diameter / 2, scene.companions, scene.letter_place):
            return None
        return replace(scene, main=replace(main, size=size, diameter=diameter, x=x, y=y))

    def _move_main(self, scene: Scene, rng: np.random.Generator) -> Scene | None:
        radius = scene.main.diameter / 2
        free = self._free_places(scene.companions, radius, scene.letter_place)
        free = [place for place in free if place != scene.main.place]
        if not free:
            return None
        place = str(rng.choice(free))
        x, y = _jittered_center(rng, place, scene.main.diameter)
        return replace(scene, main=replace(scene.main, place=place, x=x, y=y))

    def _change_companion(
        self, scene: Scene, factor: str, rng: np.random.Generator
    ) -> Scene | None:
        """Change, move or (for the count) add or remove one of the companions."""
        if factor == "count":
            return self._change_count(scene, rng)
        if not scene.companions:
            return None
        index = int(rng.integers(len(scene.companions)))
        companion = scene.companions[index]
        if factor == "companion shape":
            value = _another(rng, self._seen_shapes(companion.color), companion.shape)
            changed = replace(companion, shape=value) if value else None
        elif factor == "companion color":
            value = _another(rng, self._seen_colors(companion.shape), companion.color)
            changed = replace(companion, color=value) if value else None
        else:
            free = self._free_places(scene.objects, companion.diameter / 2, scene.letter_place)
            if len(scene.companions) > 1 or not free:
                return None  # captions name the place of a lone companion only
            place = str(rng.choice(free))
            x, y = _jittered_center(rng, place, companion.diameter)
            changed = replace(companion, place=place, x=x, y=y)
        if changed is None:
            return None
        companions = (*scene.companions[:index], changed, *scene.companions[index + 1 :])
        return replace(scene, companions=companions)

    def _change_count(self, scene: Scene, rng: np.random.Generator) -> Scene | None:
        companions = scene.companions
        if companions and (len(companions) == self.max_companions or rng.random() < 0.5):
            return replace(scene, companions=companions[:-1])
        if not companions:
            return None
        last = companions[-1]
        kind = (last.shape, last.color)
        added = self._add_companion(rng, scene.objects, kind, scene.letter_place)
        if added is None:
            return replace(scene, companions=companions[:-1])
        return replace(scene, companions=(*companions, added))


def _another(rng: np.random.Generator, values: Sequence[str], current: str | None) -> str | None:
    others = [value for value in values if value != current]
    return str(rng.choice(others)) if others else None


def _cell_center(place: str) -> tuple[float, float]:
    index = PLACES.index(place)
    return _CELL_CENTERS[index % 3], _CELL_CENTERS[index // 3]


def _jittered_center(
    rng: np.random.Generator, place: str, diameter: float
) -> tuple[float, float]:
    """A center near the cell's that keeps the whole object inside the picture."""
    x, y = (center + rng.uniform(-0.06, 0.06) for center in _cell_center(place))
    return _inside((x, y), diameter / 2)


def _inside(center: tuple[float, float], radius: float) -> tuple[float, float]:
    """The nearest center of a whole circle inside the picture."""
    x, y = (float(np.clip(value, radius, 1 - radius)) for value in center)
    return x, y


def _is_clear(
    center: tuple[float, float],
    radius: float,
    objects: Sequence[SceneObject],
    letter_place: str | None,
) -> bool:
    """Whether a circle leaves the objects and the letter free, but for a sliver."""
    circles = [(other.x, other.y, other.diameter / 2) for other in objects]
    if letter_place is not None:
        circles.append((*_cell_center(letter_place), _LETTER_RADIUS))
    return all(
        math.hypot(center[0] - x, center[1] - y) > 0.9 * (other_radius + radius)
        for x, y, other_radius in circles
    )


def _place_object(
    rng: np.random.Generator,
    *,
    shape: str,
    color: str,
    size: str,
    texture: str,
    place: str,
    diameter: float,
) -> SceneObject:
    x, y = _jittered_center(rng, place, diameter)
    return SceneObject(shape, color, size, texture, place, x, y, diameter)
