"""Which weights are in memory: the whole model's, or one block's at a time.

Both kinds of ``Weights`` give the same numbers: a streamed block is read from the same safetensors
and cast to float32 in the same way as a loaded model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from svdexport.checkpoint import Checkpoint, module_name
from svdexport.errors import InputError
from svdexport.models.experts import separate_experts
from svdexport.models.modules import (
    LowRankEmbedding,
    LowRankHead,
    linear_weight,
    replace_embedding,
    replace_linears,
)
from svdexport.runtimes.torch_rt import auto_class, quiet_transformers
from svdexport.safety import check_safetensors


class Weights:
    """A model that is in memory as a whole.

    Attributes:
        model: the module; of a streamed one, parameters exist only inside the contexts below.
        streamed: whether weights are read when they are needed.
    """

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextlib.contextmanager
    def block(self, path: str) -> Iterator[nn.Module]:
        """The block at a module path, with its weights."""
        yield self.model.get_submodule(path)

    @contextlib.contextmanager
    def ends(self) -> Iterator[nn.Module]:
        """The model with the weights of everything outside the blocks (embedding, norm, head)."""
        yield self.model

    @contextlib.contextmanager
    def on_call(self) -> Iterator[nn.Module]:
        """The model, to be called as a whole; a streamed module has weights during its call."""
        yield self.model

    def linear(self, name: str) -> Tensor:
        """Weight of a linear as (out_features, in_features), float32."""
        return linear_weight(self.model.get_submodule(name))


def as_weights(model: nn.Module | Weights) -> Weights:
    """A loaded model as ``Weights``; what is that already stays as it is."""
    return model if isinstance(model, Weights) else Weights(model)


class StreamedWeights(Weights):
    """A model whose weights stay in its safetensors until they are needed.

    Args:
        folder: a Hugging Face folder, dense or compressed. blocks: module paths of the decoder
            blocks. trust_remote_code: whether code in the folder may run.
        values: a safetensors file; what it holds is taken instead of the folder's tensors.

    Raises:
        InputError: transformers makes this model's parameters from several of its tensors, so
            that they cannot be read one by one; the line names one.
    """

    streamed = True

    def __init__(
        self,
        folder: Path,
        blocks: tuple[str, ...],
        trust_remote_code: bool = False,
        values: Path | None = None,
    ) -> None:
        super().__init__(_empty_model(folder, trust_remote_code))
        self._checkpoint = Checkpoint.open(folder)
        self._values = values
        self._given = set(check_safetensors(values).tensors) if values is not None else set()
        self._names = _stored_names(self.model, self._checkpoint)
        for name, _ in list(self.model.named_buffers()):
            if self._checkpoint.has(name):  # others are made anew from the configuration
                self.model.get_submodule(name.rpartition(".")[0]).register_buffer(
                    name.rpartition(".")[2], self._checkpoint.tensor(name)
                )
        self._outside = [
            (module, name, part)
            for module, name, part in self._needs()
            if not any(name == path or name.startswith(path + ".") for path in blocks)
        ]

    def _needs(self) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """(module, name, part): a call of the module needs the weights of the part of that name."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield module, name, module
            if isinstance(module, LowRankEmbedding | LowRankHead):
                for part in module.read:
                    yield module, names[id(part)], part

    @contextlib.contextmanager
    def block(self, path: str) -> Iterator[nn.Module]:
        block = self.model.get_submodule(path)
        with contextlib.ExitStack() as stack:
            for name, module in block.named_modules(prefix=path):
                stack.enter_context(self._filled(name, module))
            yield block

    @contextlib.contextmanager
    def ends(self) -> Iterator[nn.Module]:
        """A module's weights are read when it is first called, and dropped at the end."""
        with contextlib.ExitStack() as stack:
            called: set[str] = set()

            def fill(name: str, module: nn.Module) -> None:
                if name not in called:
                    called.add(name)
                    stack.enter_context(self._filled(name, module))

            for module, name, part in self._outside:
                hook = module.register_forward_pre_hook(
                    lambda _module, _inputs, name=name, part=part: fill(name, part)
                )
                stack.callback(hook.remove)
            yield self.model

    @contextlib.contextmanager
    def on_call(self) -> Iterator[nn.Module]:
        with contextlib.ExitStack() as stack:
            for module, name, part in self._needs():
                self._fill_on_call(module, name, part, stack)
            yield self.model

    def _fill_on_call(
        self, module: nn.Module, name: str, part: nn.Module, hooks: contextlib.ExitStack
    ) -> None:
        filled: list[contextlib.AbstractContextManager[nn.Module]] = []

        def before(_module: nn.Module, _inputs: object) -> None:
            filled.append(self._filled(name, part))
            filled[-1].__enter__()

        def after(_module: nn.Module, _inputs: object, _output: object) -> None:
            filled.pop().__exit__(None, None, None)

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after, always_call=True).remove)

    def linear(self, name: str) -> Tensor:
        spec = self._checkpoint.low_rank.get(name)
        parts = [name] if spec is None else [f"{spec.group}.lr_a", f"{name}.lr_b"]
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(self._filled(part, self.model.get_submodule(part)))
            return linear_weight(self.model.get_submodule(name))

    @contextlib.contextmanager
    def _filled(self, name: str, module: nn.Module) -> Iterator[nn.Module]:
        """The module with its own parameters (not its children's) in float32."""
        empty = dict(module.named_parameters(recurse=False))
        for key, parameter in empty.items():
            full = f"{name}.{key}" if name else key
            value = self._tensor(full).float()
            if value.shape != parameter.shape:
                raise InputError(
                    f"{self._checkpoint.path}: tensor {full} has shape {tuple(value.shape)}, "
                    f"config.json means {tuple(parameter.shape)}"
                )
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        try:
            yield module
        finally:
            module._parameters.update(empty)

    def _tensor(self, full: str) -> Tensor:
        for name in (full, self._names[full]):
            if name in self._given and self._values is not None:
                with safe_open(self._values, framework="pt") as file:
                    given: Tensor = file.get_tensor(name)
                return given
        return self._checkpoint.tensor(self._names[full])


def _empty_model(folder: Path, trust_remote_code: bool) -> nn.Module:
    """The model with parameters on the meta device and buffers (rotary frequencies) as they are."""
    from transformers import AutoConfig

    with quiet_transformers(), _parameters_on_meta():
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model: nn.Module = auto_class(folder).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        checkpoint = Checkpoint.open(folder)
        replace_linears(model, checkpoint.low_rank)
        if checkpoint.embedding is not None:
            replace_embedding(model, checkpoint.embedding)
        separate_experts(model)
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this context register their parameters without memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> tensor name: the same, without the base model's prefix, or a tied one's."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored = {module_name(tensor): tensor for tensor in checkpoint.names()}
    found: dict[str, str] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for known in (name, name.removeprefix(prefix), prefix + name):
            if known in stored:
                found[name] = stored[known]
                break
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        stored_as = [found[name] for name in names if name in found]
        if not stored_as:
            raise InputError(
                f"{checkpoint.path}: weights of this model cannot be streamed: no tensor holds "
                f"{names[0]} as it is; set compress.stream: never and give more memory"
            )
        found |= {name: found.get(name, stored_as[0]) for name in names}
    return found
