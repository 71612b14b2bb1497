"""Which family of kernels a scheme is for, first that fits."""

from __future__ import annotations

from ctconvert.formats.quantization.records import ModuleScheme, QuantArgs, Scheme
from ctconvert.specs import Family


def family(module: ModuleScheme, stored: str, embedding: bool) -> Family:
    """The scheme family of a module, first that fits.

    ``wna8o8`` are INT weights with static INT8 activations.

    Args:
        module: the module's scheme.
        stored: the format its tensors are stored in.
        embedding: whether the module is a lookup table.
    """
    if module.sparse:
        return "sparse24"
    scheme = module.scheme
    if scheme is None or scheme.weights is None:
        return "other"
    weights, inputs, outputs = scheme.weights, scheme.input_activations, scheme.output_activations
    if embedding:
        return "embedding" if weights.type == "int" else "other"
    if weights.type == "float" and weights.num_bits == 4:
        if weights.strategy == "tensor_group":
            return "nvfp4"
        return "mxfp4" if weights.group_size == 32 else "other"
    is_int = weights.type == "int"
    packable = stored in ("pack-quantized", "int-quantized", "naive-quantized")
    if is_int and packable and weights.strategy in ("channel", "group"):
        if _static_int8(outputs):
            return "wna8o8"
        if _static_int8(inputs) and weights.num_bits < 8:
            return "wna8o8"
    if weights.num_bits == 8 and outputs is None:
        same = inputs is None or (
            inputs.type == weights.type and inputs.num_bits == 8 and _w8a8_inputs(weights, inputs)
        )
        if weights.type == "float" and weights.strategy in ("tensor", "channel", "block") and same:
            return "w8a8"
        if is_int and inputs is not None and same:
            return "w8a8"
    if is_int and inputs is not None and inputs.type == "int" and outputs is None:
        dynamic_token = bool(inputs.dynamic) and inputs.strategy == "token"
        if weights.num_bits == 4 and inputs.num_bits == 8 and dynamic_token:
            return "w4a8"
    if is_int and inputs is None and outputs is None:
        return "wna16"
    return "other"


def _static_int8(args: QuantArgs | None) -> bool:
    return (
        args is not None
        and args.type == "int"
        and args.num_bits == 8
        and not args.dynamic
        and args.strategy == "tensor"
    )


def _w8a8_inputs(weights: QuantArgs, inputs: QuantArgs) -> bool:
    """Static per tensor or dynamic per token; in groups of 128 only beside block-wise weights."""
    if not inputs.dynamic:
        return inputs.strategy == "tensor"
    if weights.strategy == "block":
        return inputs.strategy == "group" and inputs.group_size == 128
    return inputs.strategy == "token"


def activations_label(scheme: Scheme | None) -> str | None:
    """For people and the manifest: ``int8 dynamic token in``, or None for weight-only."""
    if scheme is None:
        return None
    labels = []
    for args, end in ((scheme.input_activations, "in"), (scheme.output_activations, "out")):
        if args is not None:
            kind = "fp" if args.type == "float" else "int"
            when = "dynamic" if args.dynamic else "static"
            asym = "" if args.symmetric else "asym "
            labels.append(f"{kind}{args.num_bits} {asym}{when} {args.strategy} {end}")
    return ", ".join(labels) or None
