"""``--cfg-options``: values with brackets, quotes and dicts, and keys that the config does not have."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from vheat_mm.utils.config_place import did_you_mean
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.process import process_rank

# Keys at the top of a config that the Runner or the tools read.
_READ = {
    *inspect.signature(Runner).parameters,
    *('activation_checkpointing', 'auto_scale_lr', 'compile', 'custom_imports', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline'),
}


class CfgOptionsAction(DictAction):
    """MMEngine's ``KEY=VALUE`` options, and dicts as values: ``key="dict(type='Foo',x=1)"`` or ``key="{'x':1}"``.

    A value that cannot be read is a usage error.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the options to the namespace."""
        for pair in values or ():
            key, equals, _ = pair.partition('=')
            if not equals or not key or not all(key.split('.')):
                parser.error(f'{option_string}: expected KEY=VALUE, got {pair!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError, RecursionError) as error:
            parser.error(f'{option_string}: {error}')

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """Read one value; called by MMEngine."""
        text = val.strip()
        if text[:1] in ('"', "'") and (len(text) < 2 or text[-1] != text[0]):
            raise ValueError(f'{val!r} has an opening quote without a closing one')
        inner = text.strip('\'"')
        holds_dict = inner.startswith(('dict(', '{', '[', '(')) and ('dict(' in inner or '{' in inner)
        if any(inner.count(opening) != inner.count(closing) for opening, closing in ('()', '[]')):
            raise ValueError(f'{val!r} has brackets that do not match; write key="[(a,b),(c,d)]", quoted')
        if not holds_dict:
            try:
                return DictAction._parse_iterable(val)
            except RecursionError:
                raise ValueError(f'{val!r} is no value; write key="[a,b]" or key="dict(type=\'Foo\',x=1)"') from None
        try:
            return _evaluate(ast.parse(inner, mode='eval').body)
        except (SyntaxError, ValueError):
            raise ValueError(f'{val!r} is no dict; write key="dict(type=\'Foo\',x=1)", quoted as a whole') from None


def _evaluate(node: ast.expr) -> Any:
    """Value of an expression of dicts, lists, tuples, numbers and strings; bare names are strings, as elsewhere."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {_name(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            _name(key and _evaluate(key)): _evaluate(value) for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_evaluate(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return DictAction._parse_int_float_bool(ast.unparse(node))  # 'true', as MMEngine reads it elsewhere
    return ast.literal_eval(node)


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError('keys of a dict must be names')
    return key


def check_keys(cfg: Config, options: Mapping[str, Any]) -> None:
    """Check that the keys lead through dicts and lists of the config.

    A new key may be meant, such as ``model.backbone.with_cp``; it is mentioned on stderr if it resembles an existing
    one. At the top of the config, nothing would read it.

    Raises:
        ToolError: A key leads through a number or text, or beyond a list; a key at the top is misspelled.
    """
    for key in options:
        node: Any = cfg
        parts = key.split('.')
        if parts[0] in cfg and parts[0] not in _READ and process_rank() == 0:
            text = (
                f'--cfg-options {key}: {parts[0]} is a variable of the config file; what it was used for stays as it is'
            )
            print(text, file=sys.stderr, flush=True)
        for depth, part in enumerate(parts):
            place = '.'.join(parts[:depth])
            if isinstance(node, (list, tuple)):
                if not part.isdigit() or int(part) >= len(node):
                    raise ToolError(
                        f'--cfg-options {key}: {place} is a list of {len(node)}, so write {place}.0 or the like'
                    )
                node = node[int(part)]
            elif not isinstance(node, (dict, Config)):
                if node is None:
                    break
                raise ToolError(f'--cfg-options {key}: {place} is {node!r}, which has no entry {part!r}')
            elif part in node:
                node = node[part]
            else:
                _mention_new_key(key, part, node, top=depth == 0)
                break


def _mention_new_key(key: str, part: str, node: Any, top: bool) -> None:
    hint = '' if top and part in _READ else did_you_mean(part, {*node.keys(), *(_READ if top else ())})
    if hint and top:
        raise ToolError(f'--cfg-options {key}: the config has no {part!r}, and nothing would read it{hint}')
    if hint and process_rank() == 0:
        print(f'--cfg-options {key}: {part!r} is a new entry{hint}', file=sys.stderr, flush=True)
