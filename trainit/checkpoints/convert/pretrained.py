"""A model of `transformers` in a folder, from which a run begins: --config.checkpoint.load_path=hf:FOLDER."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from trainit import tokenizers
from trainit.checkpoints.convert import families, read_config, tensor_files
from trainit.config import ConfigDict, ConfigError, flatten, jsonl, model, require
from trainit.parallel.layout import is_stacked
from trainit.parallel.trees import path_name

PREFIX = "hf:"
# Arrays that some versions have saved with a model, and that follow from its config.
_DERIVED = re.compile(r"(.*\.)?(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


def is_pretrained(load_path: str) -> bool:
    """Whether checkpoint.load_path names a folder of `transformers`."""
    return load_path.startswith(PREFIX)


class Pretrained:
    """The folder of one model. Raises ConfigError if it is damaged, or Trainit has no such model."""

    def __init__(self, load_path: str):
        self.folder = Path(load_path.removeprefix(PREFIX))
        require(self.folder.is_dir(), f"{load_path}: there is no such folder")
        self._views = tensor_files.views(self.folder)
        about = tensor_files.read_json(self.folder / "config.json")
        names = {family.names["head"] + ".weight" for family in families.FAMILIES if "head" in family.names}
        tied = not names & set(self._views)
        self.family, self.fields = read_config.read(about, tied, str(self.folder / "config.json"))

    def fill(self, config: ConfigDict) -> None:
        """Sets the model's fields, in place. Raises ConfigError where the config has set another value."""
        usual, mine = flatten(model()), flatten(config.model)
        given = config.checkpoint.load_step
        require(given == -1, f"checkpoint.load_step={given}: the model in {self.folder} has no steps")
        for name, value in self.fields.items():
            require(
                name == "context_length" or mine[name] in (usual[name], value),
                f"model.{name}={mine[name]!r}, but the model in {self.folder} has {value!r}; leave it out",
            )
        length = mine["context_length"]
        if length == usual["context_length"]:  # it is open
            length = min(length, self.fields["context_length"])
        config.model.update_from_flattened_dict({**self.fields, "context_length": length})
        d, files = config.dataset, self.tokenizer_choice()
        if "streams" in d and d.tokenizer == jsonl().tokenizer and files:
            d.tokenizer = files

    def tokenizer_choice(self) -> str:
        """The value of dataset.tokenizer that means the folder's own; empty if it has none."""
        for kind, file in (("tokenizers", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
            if (self.folder / file).exists():
                return f"{kind}:{self.folder / file}"
        return ""

    def check_tokenizer(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Raises ConfigError unless a text gets the same ids as from the folder's own tokenizer."""
        if not (choice := self.tokenizer_choice()):
            logging.warning("tokenizer  %s has none, with which the data's could be compared", self.folder)
            return
        try:
            own = tokenizers.find(choice)
        except ValueError as error:
            logging.warning("tokenizer  of %s cannot be compared: %s", self.folder, error)
            return
        tokenizers.check_same(tokenizer, own, str(self.folder))

    def parameters(self, abstract: dict) -> dict:
        """Float32 arrays of these shapes and shardings, of which each process reads its own parts."""
        leaves, structure = jax.tree.flatten_with_path(abstract)
        parts = {path_name(path): leaf for path, leaf in leaves}
        views = {path: self._layers(path, leaf.shape) for path, leaf in parts.items()}
        self._check_all_used(views)
        arrays = [_array(leaf, views[path], is_stacked(path)) for path, leaf in parts.items()]
        return jax.tree.unflatten(structure, arrays)

    def _layers(self, path: str, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Views of a parameter's numbers: one for each layer, or one alone."""
        count, one = (shape[0], shape[1:]) if is_stacked(path) else (1, shape)
        return [self._view(path, layer, one) for layer in range(count)]

    def _view(self, path: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        name = families.array_name(self.family, path).format(layer)
        array = self._find(name)
        require(array is not None, f"{self.folder} lacks {name}, which is {path} here")
        try:
            return families.own_part(self.family, path, array, shape)
        except ValueError:
            raise ConfigError(
                f"{self.folder}: {name} has the shape {list(array.shape)}, which does not make {path} of "
                f"{list(shape)}; its config.json is of another model, or model.context_length is too large"
            ) from None

    def _find(self, name: str) -> Any:
        """An array by its name with or without the prefix of the model's body, which some files lack."""
        return self._views.get(name, self._views.get(name.partition(".")[2]))

    def _check_all_used(self, views: Mapping[str, list[np.ndarray]]) -> None:
        names = {
            families.array_name(self.family, path).format(layer)
            for path, layers in views.items()
            for layer in range(len(layers))
        }
        names |= {name.partition(".")[2] for name in names}
        if "head/kernel" not in views:  # a copy of the embedding, where that is the head
            names.add(self.family.names["head"] + ".weight")
        rest = sorted(name for name in self._views if name not in names and not _DERIVED.fullmatch(name))
        require(
            not rest,
            f"{self.folder} has arrays that a {self.family.architecture} of its config.json has no place "
            f"for: {', '.join(rest[:3])}{', ...' if len(rest) > 3 else ''}",
        )


def _array(leaf: jax.ShapeDtypeStruct, layers: list[np.ndarray], stacked: bool) -> jax.Array:
    """An array of a parameter, which is read and put on its devices part by part: none waits in memory."""
    devices: dict[str, list] = {}
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    for device, index in places.items():
        devices.setdefault(str(index), []).append((device, index))
    shards = []
    for of_part in devices.values():
        numbers = _read(layers, stacked, of_part[0][1])
        shards += jax.block_until_ready([jax.device_put(numbers, device) for device, _ in of_part])
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _read(layers: list[np.ndarray], stacked: bool, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a parameter that `index` names, in float32; only that part is read."""
    chosen, within = (layers[index[0]], index[1:]) if stacked else (layers, index)
    numbers = np.empty((len(chosen), *chosen[0][within].shape), np.float32)
    for number, layer in enumerate(chosen):
        numbers[number] = layer[within]
        tensor_files.release(layer)
    return numbers if stacked else numbers[0]
