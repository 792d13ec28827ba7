//! Owns how the tasks of one connection thread are woken from other threads: many wake-ups, one signal.
//!
//! A single-threaded runtime is told of every wake-up from another thread by a system call of its own. The
//! store acknowledges many connections at once, and each delivery, settlement and acknowledgement crosses threads,
//! so these calls, and the switches that follow, would cost more than the messages. A [`WakeRelay`] gathers the
//! wake-ups that meet its thread awake, without any system call: the thread finds them before it polls the next
//! task, and before it sleeps. Only a thread that sleeps is signalled, once.
//!
//! ```
//! use edgehub_broker::wake::WakeRelay;
//!
//! let relay = WakeRelay::new();
//! let mut builder = tokio::runtime::Builder::new_current_thread();
//! let runtime = relay.install(&mut builder).enable_all().build()?;
//! relay.adopt_thread(); // the thread that runs the runtime
//! runtime.block_on(async {
//!     let task = tokio::spawn(relay.wrap(async { 7 }));
//!     assert_eq!(task.await.ok(), Some(7));
//! });
//! # Ok::<(), std::io::Error>(())
//! ```

use std::cell::OnceCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle};

thread_local! {
    static OF_THREAD: OnceCell<WakeRelay> = const { OnceCell::new() };
}

/// Gathers the wake-ups of one thread's tasks; cheap to clone.
#[derive(Clone, Default)]
pub struct WakeRelay {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Tasks to wake, each at most once: bounded by the number of tasks.
    waiting: Mutex<Vec<Arc<RelayWaker>>>,
    /// Whether `waiting` may hold any.
    any_waiting: AtomicBool,
    /// Whether the thread sleeps, or is about to and has not looked at `any_waiting` since it said so.
    asleep: AtomicBool,
}

impl WakeRelay {
    /// A relay for one thread.
    pub fn new() -> Self {
        Self::default()
    }

    /// The relay of the thread that calls, if it has one.
    pub fn of_this_thread() -> Option<Self> {
        OF_THREAD.with(|relay| relay.get().cloned())
    }

    /// Lets a single-threaded runtime look at the relay before it sleeps. Takes the builder's hooks for parking.
    pub fn install<'b>(&self, builder: &'b mut Builder) -> &'b mut Builder {
        let (parking, unparked) = (self.shared.clone(), self.shared.clone());
        builder
            .on_thread_park(move || {
                parking.asleep.store(true, Ordering::SeqCst);
                // After the store: who comes later sees a sleeper and signals.
                if parking.any_waiting.load(Ordering::SeqCst) {
                    parking.asleep.store(false, Ordering::SeqCst);
                    parking.wake_waiting();
                }
            })
            .on_thread_unpark(move || {
                unparked.asleep.store(false, Ordering::SeqCst);
                unparked.wake_waiting();
            })
    }

    /// Makes the calling thread the relay's own: wake-ups from it go straight to the task. A thread keeps its first
    /// relay.
    pub fn adopt_thread(&self) {
        // A second relay of a thread would only cost detours.
        let _ = OF_THREAD.with(|relay| relay.set(self.clone()));
    }

    /// A task that runs on the relay's thread, and only there.
    pub fn wrap<F: Future>(&self, task: F) -> Relayed<F> {
        let waker = Arc::new(RelayWaker {
            relay: self.clone(),
            task: Mutex::new(Waker::noop().clone()),
            waits: AtomicBool::new(false),
        });
        Relayed { outside: Waker::from(waker.clone()), waker, task: Box::pin(task) }
    }

    fn is_of_this_thread(&self) -> bool {
        OF_THREAD.with(|relay| relay.get().is_some_and(|relay| Arc::ptr_eq(&relay.shared, &self.shared)))
    }
}

impl fmt::Debug for WakeRelay {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("WakeRelay").finish_non_exhaustive()
    }
}

impl Shared {
    fn wake_waiting(&self) {
        if !self.any_waiting.load(Ordering::Relaxed) {
            return;
        }
        let waiting = {
            let mut waiting = self.waiting.lock();
            self.any_waiting.store(false, Ordering::SeqCst);
            std::mem::take(&mut *waiting)
        };
        for waker in waiting {
            // Before the wake-up: what comes after it is a reason to be woken again.
            waker.waits.store(false, Ordering::SeqCst);
            waker.task.lock().wake_by_ref();
        }
    }
}

/// Wakes one task.
struct RelayWaker {
    relay: WakeRelay,
    /// The runtime's own waker, as the last poll showed it.
    task: Mutex<Waker>,
    /// Whether it is among those that wait in the relay.
    waits: AtomicBool,
}

impl Wake for RelayWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.relay.is_of_this_thread() {
            self.task.lock().wake_by_ref();
            return;
        }
        if self.waits.swap(true, Ordering::SeqCst) {
            return;
        }
        let shared = &self.relay.shared;
        {
            let mut waiting = shared.waiting.lock();
            waiting.push(Arc::clone(self));
            shared.any_waiting.store(true, Ordering::SeqCst);
        }
        // One of those that see the sleeper signals; the thread then finds all.
        if shared.asleep.swap(false, Ordering::SeqCst) {
            self.task.lock().wake_by_ref();
        }
    }
}

/// A task whose wake-ups go through a relay.
pub struct Relayed<F> {
    /// What the task itself gets as its waker.
    outside: Waker,
    waker: Arc<RelayWaker>,
    task: Pin<Box<F>>,
}

impl<F: Future> Future for Relayed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        {
            let mut task = this.waker.task.lock();
            if !task.will_wake(context.waker()) {
                task.clone_from(context.waker());
            }
        }
        this.waker.relay.shared.wake_waiting();
        this.task.as_mut().poll(&mut Context::from_waker(&this.outside))
    }
}

/// The thread that a task lives on, for tasks that have much to do with it.
#[derive(Clone, Debug)]
pub struct Home {
    runtime: Handle,
    relay: Option<WakeRelay>,
}

impl Home {
    /// The home of the task that calls.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn here() -> Self {
        Self { runtime: Handle::current(), relay: WakeRelay::of_this_thread() }
    }

    /// Runs a task there and waits for its end; nothing when the home is gone first. The task goes on when the
    /// future is dropped.
    pub async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let running = match &self.relay {
            Some(relay) => self.runtime.spawn(relay.wrap(task)),
            None => self.runtime.spawn(task),
        };
        match running.await {
            Ok(output) => Some(output),
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(code = "EH4011", %error, "A task has failed; please report this as a defect");
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::task::Waker;

    use tokio::sync::oneshot;

    use super::*;

    fn on_a_thread_with_relay<T>(task: impl AsyncFnOnce(&WakeRelay) -> T + Send) -> T
    where
        T: Send,
    {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let relay = WakeRelay::new();
                    relay.adopt_thread();
                    let mut builder = Builder::new_current_thread();
                    let runtime = relay.install(&mut builder).enable_all().build().expect("a runtime");
                    runtime.block_on(task(&relay))
                })
                .join()
                .expect("the thread")
        })
    }

    #[test]
    fn no_wake_up_from_another_thread_is_lost() {
        const TASKS: usize = 50;
        const ROUNDS: usize = 400;
        let (asked, questions) = mpsc::channel::<oneshot::Sender<usize>>();
        let answers = std::thread::spawn(move || {
            let mut answered = 0;
            while let Ok(question) = questions.recv() {
                question.send(answered).expect("the task waits");
                answered += 1;
            }
            answered
        });
        on_a_thread_with_relay(async move |relay: &WakeRelay| {
            let tasks: Vec<_> = (0..TASKS)
                .map(|_| {
                    let asked = asked.clone();
                    tokio::spawn(relay.wrap(async move {
                        for _ in 0..ROUNDS {
                            let (question, answer) = oneshot::channel();
                            asked.send(question).expect("the other thread listens");
                            answer.await.expect("an answer");
                        }
                    }))
                })
                .collect();
            drop(asked);
            for task in tasks {
                task.await.expect("the task ends");
            }
        });
        assert_eq!(answers.join().expect("the other thread"), TASKS * ROUNDS);
    }

    #[test]
    fn a_thread_that_is_awake_is_not_signalled() {
        /// Counts how often the runtime is asked to wake a task.
        #[derive(Default)]
        struct Signals(AtomicUsize);
        impl Wake for Signals {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let relay = WakeRelay::new();
        let signals = Arc::new(Signals::default());
        let runtime = Waker::from(signals.clone());
        let mut context = Context::from_waker(&runtime);
        let (question, answer) = oneshot::channel::<()>();
        let mut task = relay.wrap(answer);
        assert!(Pin::new(&mut task).poll(&mut context).is_pending());
        // This thread has not adopted the relay: to it, it is another one.
        question.send(()).expect("the task waits");
        assert_eq!(signals.0.load(Ordering::SeqCst), 0);
        relay.shared.wake_waiting();
        assert_eq!(signals.0.load(Ordering::SeqCst), 1);
        assert!(Pin::new(&mut task).poll(&mut context).is_ready());

        relay.shared.asleep.store(true, Ordering::SeqCst);
        task.outside.wake_by_ref();
        task.outside.wake_by_ref();
        assert_eq!(signals.0.load(Ordering::SeqCst), 2, "one signal for a sleeper, however many wake-ups");
    }

    #[test]
    fn a_task_runs_at_the_home_of_another() {
        let (home, ended) = (mpsc::channel(), mpsc::channel::<()>());
        std::thread::scope(|scope| {
            let (to_home, to_end) = (home.0, ended.1);
            scope.spawn(move || {
                on_a_thread_with_relay(async move |_: &WakeRelay| {
                    to_home.send((Home::here(), std::thread::current().id())).expect("the test waits");
                    tokio::task::spawn_blocking(move || to_end.recv()).await.expect("no panic").ok();
                });
            });
            let (home, its_thread) = home.1.recv().expect("a home");
            assert!(home.relay.is_some());
            let here = Builder::new_current_thread().build().expect("a runtime");
            let ran_on = here.block_on(home.run(async { std::thread::current().id() }));
            assert_eq!(ran_on, Some(its_thread));
            drop(ended.0);
        });
    }
}
