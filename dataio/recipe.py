"""What ``stoker data prepare`` is asked for: sources, stages with their options, tokenizer, output.

    recipe = load("corpus.yaml")

A recipe names a preset (`web`, `code` or `mixed`) and says what differs from it; a stage that is ``null`` is left out.
Paths are relative to the recipe's folder. What a key means stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dataio.dedup.decontaminate import Options as DecontaminateOptions
from dataio.dedup.substring import Options as SubstringOptions
from dataio.filters.code import Options as CodeOptions
from dataio.filters.language import Options as LanguageOptions
from dataio.filters.licence import Options as LicenceOptions
from dataio.filters.prose import Options as ProseOptions
from dataio.filters.redact import Options as RedactOptions
from dataio.header import check_header
from dataio.ingest.options import Source
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.sections import Section, refusal, suggestion
from stoker.yaml_core import dump_yaml, parse_yaml

FORMAT, VERSION = "stoker.recipe", 1

Count = Annotated[int, Field(ge=1)]


class ExactSection(Section):
    """Documents that differ in nothing but letter case and white space: all but the earliest are dropped."""


class NearSection(Section):
    mode: Literal["drop", "weigh"] = "drop"
    """drop: of a cluster one document stays; weigh: all stay, each with the weight 1 / size of the cluster as found,
    whatever becomes of its other members."""


class StagesSection(Section):
    """The stages in their order; null leaves one out."""

    licence: LicenceOptions | None = None
    """Which licences may be used."""
    code: CodeOptions | None = None
    """Quality of code."""
    language: LanguageOptions | None = None
    """Which natural languages prose may be in."""
    prose: ProseOptions | None = None
    """Quality of prose."""
    redact: RedactOptions | None = None
    """Addresses, keys and secrets that are replaced when tokens are made."""
    exact: ExactSection | None = None
    """Exact copies."""
    near: NearSection | None = None
    """Near-duplicates."""
    substring: SubstringOptions | None = None
    """Repeated passages that are cut out when tokens are made."""
    decontaminate: DecontaminateOptions | None = None
    """Documents that hold items of evaluation sets."""


class TokenizerSection(Section):
    path: str | None = None
    """A tokenizer.json, or a tiktoken file of ranks; null: one is trained."""
    pattern: str | None = None
    """The regular expression that a tiktoken file's tokenizer splits texts by; null: known by the file's name."""
    vocab_size: Annotated[int, Field(ge=257)] = 32_768
    """Tokens of a tokenizer that is trained."""
    sample_bytes: Count = 100_000_000
    """Text that one is trained on, at most: every document is in the sample or not by the hash of its id."""


class OrderSection(Section):
    header: str | None = None
    """What stands before a file of code, with {repository}, {path} and {language}; null: nothing."""

    @field_validator("header")
    @classmethod
    def _simple(cls, header: str | None) -> str | None:
        if header is not None:
            try:
                check_header(header)
            except Refusal as refusal:
                raise ValueError(str(refusal)) from None
        return header


class StoreSection(Section):
    profile: Literal["hot", "cold"] = "hot"
    """hot: plain tokens that are mapped into memory; cold: compressed, for object stores and archives."""


class ResourcesSection(Section):
    """How the work is done; nothing in the result depends on it."""

    workers: Count | None = None
    """Processes; null: one for every core."""
    memory_bytes: Annotated[int, Field(ge=64 << 20)] = 1 << 30
    """What a process may hold of signatures, hashes or anchors at a time."""


class Recipe(Section):
    preset: str = "mixed"
    """What holds where the recipe says nothing: web, code or mixed."""
    output: Annotated[str, Field(min_length=1)]
    """Folder of everything that is made."""
    seed: int = 0
    """Of the order of documents."""
    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the text comes from; each becomes a token store of its name."""
    stages: StagesSection
    """What is done with it."""
    tokenizer: TokenizerSection = TokenizerSection()
    """How it becomes tokens."""
    order: OrderSection = OrderSection()
    """How documents lie in a store."""
    store: StoreSection = StoreSection()
    """How a store lies on disk."""
    resources: ResourcesSection = ResourcesSection()
    """How many processes, how much memory."""

    @model_validator(mode="after")
    def _one_name_each(self) -> Recipe:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources: {', '.join(twice)} is the name of two; give each its own")
        return self

    def folder(self, base: Path) -> Path:
        """Of everything that is made; `base`: the folder that the recipe's paths are relative to."""
        return (base / Path(self.output).expanduser()).resolve()

    def sha256(self) -> str:
        """Hash of everything that decides the result."""
        elsewhere: Any = {"resources": True, "output": True, "preset": True, "sources": {"__all__": {"max_malformed"}}}
        return canonical.sha256(self.model_dump(mode="json", exclude=elsewhere))

    def to_yaml(self) -> str:
        """As resolved, with every default written out."""
        return dump_yaml({"format": formats.stamp(FORMAT, VERSION), **self.model_dump(mode="json")})


def load(path: Path) -> tuple[Recipe, Path]:
    """The recipe in a YAML file and the folder that its paths are relative to.

    Refuses what is not YAML, keys that do not exist (with the nearest that does), and values that cannot be.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: cannot be read as a recipe ({error}); give the path of a YAML file") from None
    return parse(parse_yaml(text, str(path)), str(path)), path.resolve().parent


def parse(values: Any, source: str = "recipe") -> Recipe:
    """The recipe that `values`, read from `source`, and its preset make."""
    if not isinstance(values, Mapping):
        raise Refusal(f"{source}: a recipe is a mapping with sources, stages and output")
    values = dict(values)
    if (stamp := values.pop("format", None)) is not None:
        formats.require({"format": stamp}, FORMAT, VERSION, source)
    name = values.get("preset", Recipe.model_fields["preset"].default)
    if name not in presets():
        raise Refusal(f"{source}: unknown preset {name}: {suggestion(str(name), presets())}")
    defaults = parse_yaml((files("dataio") / "presets" / f"{name}.yaml").read_text("utf-8"), f"preset {name}")
    try:
        return Recipe.model_validate(_merged(defaults, values))
    except ValidationError as error:
        raise refusal(error, Recipe, source) from None


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(Path(entry.name).stem for entry in (files("dataio") / "presets").iterdir())


def _merged(defaults: Any, values: Any) -> Any:
    if not (isinstance(defaults, Mapping) and isinstance(values, Mapping)):
        return values
    return {**defaults, **{key: _merged(defaults.get(key), value) for key, value in values.items()}}


def options_of(options: BaseModel, names: frozenset[str] | None = None) -> dict[str, Any]:
    """Options as a manifest keeps them; only those in `names` where they are given."""
    return options.model_dump(mode="json", include=None if names is None else set(names))
