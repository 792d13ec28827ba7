//! Durable queues and small keyed state.
