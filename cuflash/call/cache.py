"""One call of `flash_attn_with_kvcache`: bound, checked and planned where its metadata is new, and run.

One launch writes new keys and values into the cache, rotates queries and works out lengths, then attention is launched
on the whole cache, by the kernel that splits the keys where queries are few. In host memory NumPy does the same, unless
the emulator is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import frameworks, reference
from ..array import of_numpy
from ..errors import ArgumentError
from ..frameworks import CacheOptions, Framework
from ..settings import config
from ..trace.expr import Mods
from ..trace.host import HostMods
from ..trace.tracer import Bound
from .cache_checks import CACHES, INDICES, Views
from .cache_prepare import PreparedCache, attended, prepare_cache, prepared_for
from .cache_values import Values, check_values, values_of
from .device_checks import download
from .length_checks import longest
from .mods import captured_names, captured_uploads, captured_views, fold_in
from .run import Call, take_workspace, upload_all
from .views import lengths_view, views_of

Array = Any


def append_and_attend(
    arrays: dict[str, Array],
    indices: dict[str, Any],
    options: CacheOptions,
    length: int | None,
    bound: Bound | None,
) -> tuple[Array, ...]:
    """The call, of arrays that nobody follows -> out, lse if wanted, JAX's new caches."""
    framework = frameworks.of(arrays["q"])
    views = views_of(framework, arrays)
    plain = tuple(name for name, x in indices.items() if isinstance(x, (list, tuple, np.ndarray)))
    views |= {name: lengths_view(framework, x, name) for name, x in indices.items()}
    starts = views.get("cu_seqlens_q")
    if starts is not None and starts.device[0] == "cpu" and options.max_seqlen_q is None:
        options = options._replace(max_seqlen_q=longest(starts.as_numpy()))
    scalars: tuple[int | float, ...] = ()
    mods = None
    if bound is not None:
        views |= captured_views(framework, bound)
        mods, scalars, softcap = fold_in(bound, views, options.softcap)
        options = options._replace(softcap=softcap)
    prepared = prepared_for(framework, views, plain, options, mods)
    step = _Step(framework, views, prepared, scalars, length)
    step.check()
    if bound is not None and prepared.device[0] == "cuda":
        step.uploads |= captured_uploads(framework, bound, views, prepared.device)

    # From here on nothing is refused.
    results = [name for name, _, _ in prepared.results]
    if "k" in views and framework.NAME == "JAX":
        for name in CACHES:
            cache = views[name]
            views[name] = framework.empty(cache.shape, cache.dtype, cache.device)
            views[name].as_numpy()[...] = cache.as_numpy()
        results += CACHES
    step.run()
    if "k" in views and framework.NAME != "JAX":
        for name in CACHES:
            framework.written(arrays[name])
    return tuple(framework.wrap(views[name]) for name in results)


class _Step:
    """One call: its arrays, and what was prepared for their metadata.

    length  the keys that every sequence has, where `views` have no cache_seqlens; None: all there is room for
    """

    def __init__(
        self, framework: Framework, views: Views, prepared: PreparedCache, scalars: tuple[int | float, ...],
        length: int | None,
    ) -> None:  # fmt: skip
        self.framework, self.views, self.prepared, self.scalars = framework, views, prepared, scalars
        self.length = prepared.capacity if length is None else length
        self.uploads: dict[str, np.ndarray] = {}  # host values that kernels on a device need

    def check(self) -> None:
        """What the host knows of lengths and places; with `config.check` what the device does, too."""
        framework, views, device = self.framework, self.views, self.prepared.device
        known = {name: views[name].as_numpy() for name in INDICES if name in views and views[name].device[0] == "cpu"}
        if device[0] == "cuda":
            self.uploads = dict(known)
            if known and framework.capturing(device[1]):
                raise ArgumentError(
                    f"{', '.join(known)} in host memory cannot enter a CUDA graph, which would replay these very "
                    "values: copy to the device before the capture and pass that array"
                )
            # Reading back waits for the device, which nothing may under capture.
            checking = config.check and not framework.capturing(device[1])
            if checking:
                known |= download(framework, views, [n for n in INDICES if n in views and n not in known])
        else:
            checking = True
        if known or (self.prepared.options.counted and not self._plainly_fits()):
            check_values(self.prepared, views, values_of(self.prepared, views, known, self.length))
        if checking and self.prepared.attention.mods is not None:
            self._check_indices(values_of(self.prepared, views, known, self.length))

    def _plainly_fits(self) -> bool:
        """Whether a number of keys, where nothing else is known, can be seen to be right without looking further."""
        new = self.prepared.new
        return new is not None and self.length + new <= self.prepared.capacity and "rotary_cos" not in self.views

    def _check_indices(self, values: Values) -> None:
        """That mods read inside of arrays they captured, where no score decides on it."""
        mods, q, after = self.prepared.attention.mods, self.views["q"], values.after
        assert mods is not None and after is not None
        captured = download(self.framework, self.views, captured_names(mods, self.views))
        host = HostMods(mods, [*captured.values()], self.scalars)
        if not host.reads_by_score:
            starts, pad = values.starts_q, values.pad
            lengths_q = np.full(self.prepared.batch, q.shape[1]) if starts is None else np.diff(starts)
            lengths = zip(lengths_q.tolist(), (after if pad is None else after - pad).tolist(), strict=True)
            host.check_indices([*lengths], q.shape[-2], self.prepared.options.window)

    def run(self) -> None:
        """Computes what `prepared.results` names, in `views` where that is there."""
        prepared, framework, views = self.prepared, self.framework, self.views
        attend = self._run_reference() if prepared.attention.plan is None else self._launch_append()
        names = [*(name for name, _, _ in prepared.results), *prepared.attention.workspace()]
        attend |= {name: views[name] for name in names if name in views}
        Call(framework, attend, {}, prepared.attention, {}, self.scalars, self._numbers()).execute()
        views |= {name: attend[name] for name, _, _ in prepared.results}

    def _numbers(self) -> dict[str, int]:
        """What attention is told beside arrays: how many keys every sequence has, where no array says so."""
        if not self.prepared.length_by_value:
            return {}
        assert self.prepared.new is not None
        return {"k_len": self.length + self.prepared.new}

    def _launch_append(self) -> Views:
        """The launch before attention -> attention's arrays."""
        prepared, framework, views, device = self.prepared, self.framework, self.views, self.prepared.device
        upload_all(framework, self.uploads, views, device)
        take_workspace(framework, prepared.workspace, views, device)
        prepared.attention.compile()
        if prepared.append is not None:
            table = views.get("block_table") or views.get("cache_batch_idx")
            arrays = views if table is None else {**views, "page_table": table}
            where: dict[str, Any] = {"backend": "emulator"}
            if device[0] == "cuda":
                where = {"backend": "cuda", "device": device[1], "stream": framework.stream(device[1])}
            prepared.append.launch(arrays, self.length, **where)
            if device[0] == "cuda":
                framework.retain(views.values(), device[1])
        return attended(prepared.given, views)

    def _run_reference(self) -> Views:
        """The same in NumPy."""
        views, options = self.views, self.prepared.options
        arrays = {name: view.as_numpy() for name, view in views.items()}
        values = values_of(self.prepared, views, arrays, self.length)
        before, after, table, turned = values.before, values.after, values.table, values.turned
        assert before is not None and after is not None and table is not None and turned is not None
        tables = {name: arrays[name] for name in ("rotary_cos", "rotary_sin") if name in arrays}
        if "k" in views:
            reference.append_kv(
                *(arrays[name] for name in (*CACHES, "k", "v")), cache_seqlens=before, page_table=table,
                cu_seqlens_k_new=values.starts_new, rotary_seqlens=turned,
                rotary_interleaved=options.interleaved, **tables,
            )  # fmt: skip
        made = {"pages": np.arange(self.prepared.batch, dtype=np.int32), "seqused_k": after.astype(np.int32)}
        if tables:
            made["q_rotated"] = reference.rotate_queries(
                arrays["q"], *tables.values(), starts=turned, advance=max(options.window) >= 0,
                cu_seqlens_q=values.starts_q, interleaved=options.interleaved,
            )  # fmt: skip
        attend = attended(self.prepared.given, views | {name: of_numpy(x) for name, x in made.items()})
        if "cache_leftpad" in attend:
            attend["leftpad_k"] = attend.pop("cache_leftpad")
        return attend


def prepare_traced(
    framework: Any, views: Views, options: CacheOptions, mods: Mods | None, backend: str
) -> PreparedCache:
    """Checks and plans a call by views without memory, aligned to 16."""
    if mods is not None:
        mods, _, softcap = fold_in(Bound(mods), views, options.softcap)
        options = options._replace(softcap=softcap)
    return prepare_cache(framework, views, (), 0, 0, options, mods, backend)


def check_traced(prepared: PreparedCache, views: Views, known: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks index arrays whose values are known -> in NumPy."""
    known = {name: lengths_view(frameworks.numpy, x, name).as_numpy() for name, x in known.items()}
    check_values(prepared, views, values_of(prepared, views, known, prepared.capacity))
    return known


def execute_traced(framework: Any, views: Views, prepared: PreparedCache, scalars: tuple[int | float, ...]) -> None:
    """Runs it. The views hold results, and workspace on a GPU, too."""
    step = _Step(framework, views, prepared, scalars, None)
    if prepared.device[0] == "cpu":
        step.check()
    step.run()
