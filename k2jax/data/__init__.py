"""Text to batches: sources -> tokenizers -> streams -> packing -> pipeline, and count models to compare a loss with.

`sources` reads documents and holds some of them out, `tokenizers` turns them into ids, `stream` lays them end to end in
memory and `shards` on disk (`prepare` writes those), `packing` cuts windows, `pipeline` shuffles and batches with an
exactly resumable state, and `count_models` gives the bits per byte that counting alone reaches. Import the file that
you need.
"""
