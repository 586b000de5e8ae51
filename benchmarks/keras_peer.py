"""Times training steps of the original's Keras layer, one for every line on standard input.

Run by `benchmarks.speed --keras_python`, in an environment with tensorflow and tensorflow-engram alone:
`python keras_peer.py threads batch steps inputs hidden slots` prints the seconds of each step.
"""

import os
import sys
import time

threads, batch, steps, inputs, hidden, slots = map(int, sys.argv[1:])
os.environ.update(CUDA_VISIBLE_DEVICES="-1", TF_CPP_MIN_LOG_LEVEL="2")

import keras  # noqa: E402 (TensorFlow reads the environment when it is imported)
import tensorflow as tf  # noqa: E402
from tensorflow_engram.layers import EngramCell  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)
x = tf.random.normal((batch, steps, inputs))
layer = keras.layers.RNN(EngramCell(hidden, slots), return_sequences=True)
layer(x)  # makes the weights


@tf.function
def step(x: tf.Tensor) -> list[tf.Tensor]:
    """Forward and backward."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, training=True))
    return tape.gradient(loss, layer.trainable_variables)


for _ in sys.stdin:
    begin = time.perf_counter()
    step(x)[-1].numpy()  # waits for the result
    print(time.perf_counter() - begin, flush=True)
