"""Feature extraction: each distinct image and text through its frozen encoder, once, into the cache.

Items are cut into fixed batches before anything is looked up in the cache, and a batch is computed by one thread: the
order of additions, hence every bit of a feature on the CPU, depends on neither what is cached, nor the number of cores,
nor the number of processes.
"""

import contextlib
import ctypes
import signal
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmfusion.distributed import Processes
from mmfusion.encoders.cache import FeatureCache, text_digest
from mmfusion.encoders.frozen import (
    EncoderConfig,
    ImageEncoder,
    TextEncoder,
    find_text_encoder,
    image_preprocessing,
    text_identity,
    token_identity,
)
from mmfusion.encoders.images import ImageBatches
from mmfusion.encoders.tokens import ImageTokenEncoder, TextTokenEncoder
from mmfusion.encoders.weights import EncoderSource, resnet50_file
from mmfusion.sequences import Sequences

BATCH_CPU = 16  # ResNet-50 at 224, one thread, ms per image: 62 at 8, 47 at 16, 52 at 32
BATCH_CUDA = 128
SENT_AT_ONCE = 256  # features from process to process: 51 MB of 7 x 7 cells

Group = TypeVar("Group", bound=Hashable)
Job = tuple[list[str], Callable[[], Tensor | list[Tensor]]]


# ten parameters: what is encoded, by what and into what; the last five have defaults
def encode_images(
    files: dict[str, Path],
    cache: FeatureCache,
    config: EncoderConfig,
    source: EncoderSource,
    processes: Processes,
    *,
    workers: int | None = None,
    stop_at_bad: bool = True,
    only_check: bool = False,
    change: Callable[[Image.Image, str], Image.Image] | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Bring the features of all files (digest -> path) into `cache`; returns digest -> reason of the undecodable ones.

    With `change` (picture, digest) -> picture the changed pictures are encoded, and a digest stands for a file and what
    is done to it.

    With `stop_at_bad` the first bad file ends the encoding, and with `only_check` it does not begin: files are decoded
    all the same, so that all bad ones are known.
    """
    ordered = sorted(files)  # by content, so that the order of rows changes nothing
    bad: dict[str, str] = {}
    with _cache_held(files, cache, processes), processes.together():
        pending = _pending_batches([(digest, digest) for digest in ordered], cache, processes)
        mine = processes.share(pending)
        if mine and not only_check and source.is_torchvision:
            resnet50_file(source)  # before the first picture is decoded: missing weights show at once
        if mine:
            preprocessing = image_preprocessing(config, source)
            wanted = [[digest not in cache for digest, _ in batch] for batch in mine]
            keys = [[digest for digest, _ in batch] for batch in mine]
            batches = ImageBatches(
                [[files[key] for key in batch] for batch in keys], wanted, preprocessing, keys, change
            )
            decoded = _in_workers(batches, _worker_count(processes) if workers is None else workers)
            kind = ImageTokenEncoder if cache.holds_tokens else ImageEncoder
            build = partial(kind, config, source, processes.device)
            jobs = _image_jobs(mine, decoded, build, bad, stop_at_bad, only_check)
            _run(jobs, cache, processes, _bar("images", mine, progress and processes.is_main))
    _share_vectors(set(files), cache, processes)
    return {digest: reason for part in processes.gather(bad) for digest, reason in part.items()}


def encode_texts(
    texts: dict[str, str],
    cache: FeatureCache,
    config: EncoderConfig,
    source: EncoderSource,
    processes: Processes,
    *,
    progress: bool = True,
) -> None:
    """Bring the features of all texts (digest -> text) into `cache`."""
    complete = all(digest in cache for digest in texts)
    if not all(processes.gather(complete)):
        with processes.together():
            encoder = (TextTokenEncoder if cache.holds_tokens else TextEncoder)(config, source, processes.device)
            tokens = dict(zip(texts, encoder.tokenize(list(texts.values())), strict=True))
        # by length, so that little is padded; then by content, so that the order of rows changes nothing
        ordered = sorted(texts, key=lambda digest: (len(tokens[digest]), digest))
        with _cache_held(texts, cache, processes), processes.together():
            pending = _pending_batches([(digest, tokens[digest]) for digest in ordered], cache, processes)
            mine = processes.share(pending)
            jobs = (([digest for digest, _ in batch], partial(encoder, [row for _, row in batch])) for batch in mine)
            _run(jobs, cache, processes, _bar("texts", mine, progress and processes.is_main))
    _share_vectors(set(texts), cache, processes)


def encode_text_groups(
    groups: Mapping[Group, Sequence[str]],
    cache_dir: Path,
    config: EncoderConfig,
    processes: Processes,
    *,
    kind: str = "text",
    progress: bool = True,
    tokens: bool = False,
) -> tuple[dict[Group, Tensor | Sequences], dict[str, object]]:
    """Vectors (N, d) of each group of N texts through the cache, and what to record of their encoder.

    With `tokens`, N sequences of words (T_i, d) in their place. `kind` begins the name of the cache's folder. Raises
    InputError where the encoder cannot be read.
    """
    with processes.together():
        config = config.filled()
        source = find_text_encoder(config)
        identity = text_identity(config, source, processes.device)
        identity = token_identity(identity) if tokens else identity
        cache = FeatureCache(Path(cache_dir), kind, identity)
    unique = {text_digest(text): text for texts in groups.values() for text in texts}
    encode_texts(unique, cache, config, source, processes, progress=progress)
    join = Sequences if tokens else torch.stack
    features = {name: join([cache.vectors[text_digest(t)] for t in texts]) for name, texts in groups.items()}
    record = {"encoder_config": asdict(config), "encoders": {"text": {"name": source.name, **identity}}}
    return features, record


@contextlib.contextmanager
def _cache_held(needed: Iterable[str], cache: FeatureCache, processes: Processes) -> Iterator[None]:
    """Where vectors are missing: alone in the cache, after reading what a run beside this one has left there."""
    with contextlib.ExitStack() as held:
        if any(processes.gather(any(digest not in cache for digest in needed))):
            with processes.together():
                if processes.is_main:
                    held.enter_context(cache.held())
            with processes.together():  # a block of its own: all come here once the main one holds the cache
                cache.refresh()
        yield


def _pending_batches(items: list[tuple[str, object]], cache: FeatureCache, processes: Processes) -> list[list]:
    """Fixed batches, without those of which every item is cached in some process."""
    size = BATCH_CUDA if processes.device.startswith("cuda") else BATCH_CPU
    known = set().union(*processes.gather({digest for digest, _ in items if digest in cache}))
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    return [batch for batch in batches if any(digest not in known for digest, _ in batch)]


def _worker_count(processes: Processes) -> int:
    """Decoding takes an eighth of the encoder's time on a CPU, and most of the time beside a GPU."""
    return min(16, max(1, processes.cores - 1 if processes.device.startswith("cuda") else processes.cores // 4))


def _as_it_is(batch: object) -> object:
    return batch


def _die_with_parent(_: int) -> None:
    """Else a worker whose parent is killed waits for ever to hand its batch over (PR_SET_PDEATHSIG of Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _in_workers(batches: ImageBatches, workers: int) -> DataLoader:
    """Decode in worker processes, ahead of the encoder.

    Forked on Linux: a worker needs no second import of torch and no guard around the main script, and it only decodes,
    on one thread, so it touches none of the locks that a fork can leave closed. Batches travel as NumPy arrays through
    a pipe, not as tensors through /dev/shm, which is small in many containers.
    """
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=context,
        worker_init_fn=_die_with_parent,
        prefetch_factor=2 if workers else None,
    )


def _image_jobs(
    batches: list[list],
    decoded: DataLoader,
    build: Callable[[], ImageEncoder],
    bad: dict[str, str],
    stop_at_bad: bool,
    only_check: bool,
) -> Iterator[Job]:
    """Encoder calls for the batches as they come decoded; bad files are entered in `bad`."""
    encoder: ImageEncoder | None = None
    for index, good, pixels, reasons in decoded:
        digests = [digest for digest, _ in batches[index]]
        bad |= {digests[place]: reason for place, reason in reasons.items()}
        if pixels is None or only_check or (bad and stop_at_bad):
            yield [], torch.empty
            continue
        encoder = encoder or build()  # only now: files that never decode need no model
        yield [digests[place] for place in good], partial(encoder, pixels)


def _bar(unit: str, batches: list[list], shown: bool) -> tqdm:
    total = sum(map(len, batches))
    return tqdm(total=total, desc=f"encoding {unit}", unit=f" {unit}", disable=not (shown and total), mininterval=0.5)


@contextlib.contextmanager
def _encoder_threads(processes: Processes) -> Iterator[tuple[Executor, int]]:
    """A pool in which each batch runs on one thread of its own (CPU), or one thread that feeds the GPU."""
    on_gpu = processes.device.startswith("cuda")
    threads = 1 if on_gpu else processes.cores
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=None if on_gpu else partial(torch.set_num_threads, 1))
    try:
        yield pool, threads
    except BaseException as error:
        # who presses Ctrl-C does not wait for the batches that are being computed
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    else:
        pool.shutdown()
    finally:
        if not on_gpu:
            torch.set_num_threads(before)


def _run(jobs: Iterator[Job], cache: FeatureCache, processes: Processes, bar: tqdm) -> None:
    """Run encoder calls a few at a time and hand their vectors to the cache, in order; what is encoded is kept."""
    waiting: deque[tuple[list[str], Future[Tensor | list[Tensor]]]] = deque()

    def take() -> None:
        digests, future = waiting[0]
        cache.add(digests, future.result())
        waiting.popleft()
        bar.update(len(digests))

    with bar, _encoder_threads(processes) as (pool, threads):
        try:
            for digests, call in jobs:
                if digests:
                    waiting.append((digests, pool.submit(call)))
                if len(waiting) > threads:
                    take()
            while waiting:
                take()
        except KeyboardInterrupt:
            for digests, future in waiting:
                if future.done() and future.exception() is None:
                    cache.add(digests, future.result())
            cache.flush()
            raise
        cache.flush()


def _share_vectors(needed: set[str], cache: FeatureCache, processes: Processes) -> None:
    """Give every process the vectors that it lacks, whether or not the cache folder is one for all nodes."""
    if processes.world_size > 1 and cache.holds_tokens:
        processes.gather(None)  # all have written theirs; of a common folder they are read, not sent
        cache.refresh()
    lacking = sorted(set().union(*processes.gather({digest for digest in needed if digest not in cache})))
    if processes.world_size == 1:
        return
    for start in range(0, len(lacking), SENT_AT_ONCE):
        own = {digest: cache.vectors[digest] for digest in lacking[start : start + SENT_AT_ONCE] if digest in cache}
        own = {digest: x.clone() if isinstance(x, Tensor) else x.read() for digest, x in own.items()}
        sent = {digest: x for part in processes.gather(own) for digest, x in part.items() if digest not in cache}
        if cache.holds_tokens and sent:  # onto disk: processes of one node lack the same, and write the same shard
            cache.add(sorted(sent), [sent[digest] for digest in sorted(sent)])
            cache.flush()
        else:
            cache.vectors |= sent
