"""Measures a server through gRPC: time per token at batches, time to the first token at prompt
lengths, and throughput at request rates.

What makes the figures hold:

- Every prompt is new, of random token ids, so that the prefix cache can't help; an answer that says it
  did is a failure. So is one that has not exactly the tokens that were asked for (`ignore_eos`).
- A token counts when the response with it arrives, whether it has text yet or not. Requests share one
  thread and one connection, which takes the least from the cores that the cluster may be using too.
- Nothing is drawn while a batch or a prompt is measured, and warm-up runs of the same shape come first.

Terms: TTFT is the time from sending a request to its first token; TPOT that from the first token to
the last over the tokens after the first; a pause the time between two responses with tokens; the
latency that until the request has ended.
"""
