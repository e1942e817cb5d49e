"""Run one function on several gloo processes, for tests: each gets (rank, size, *args) and returns something picklable."""

import multiprocessing
import pickle
import tempfile
import traceback
from pathlib import Path


def _worker(function, rank, size, store, queue, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = function(rank, size, *args)
        dist.barrier()
        dist.destroy_process_group()
        # By value: a queue would hand tensors on as open files of this process, which may be gone when they are asked for.
        queue.put((rank, pickle.dumps(result), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def run_on(size, function, *args, timeout=840):
    """Results by rank; a failure on any rank is raised here with its traceback."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    # The last process to leave removes the store itself, which may be while the folder is being removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = Path(folder) / "store"
        workers = [context.Process(target=_worker, args=(function, r, size, store, queue, args)) for r in range(size)]
        for worker in workers:
            worker.start()
        results = {}
        try:
            for _ in workers:
                rank, result, error = queue.get(timeout=timeout)
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
                results[rank] = pickle.loads(result)
        finally:
            for worker in workers:
                worker.join(60)
                if worker.is_alive():
                    worker.terminate()
                    worker.join()
    return [results[rank] for rank in range(size)]
