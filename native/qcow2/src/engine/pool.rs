// SPDX-License-Identifier: Apache-2.0
//! Threads that expand, encrypt and decrypt for the engines of a process, so that one queue's requests use more than one
//! processor.
//!
//! An engine does a lone piece of such work itself, at once. When several pieces wait it lays all but the first on its
//! [`Bench`] and calls the pool; from there both take, the engine whenever it has nothing better to do. So nothing waits
//! for a thread that is slow to wake, a pool whose threads are busy elsewhere costs nothing, and one that is closed only
//! means that engines do all themselves.
//!
//! | a piece is       | who has it                                    | it gets on when               |
//! |------------------|-----------------------------------------------|-------------------------------|
//! | waiting          | the bench; engine and threads may take it     | somebody takes it             |
//! | in hand          | a thread of the pool                          | the thread lays it back       |
//! | finished         | the bench, the engine's eventfd is readable   | the engine looks at its bench |
//!
//! Locks: the pool's before a bench's; neither is held during work.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::work::Piece;
use crate::mailbox::Mailbox;

/// The threads' common part. Whoever makes it starts the threads, each of which calls [`Pool::work`].
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
    called: Condvar,
    done: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Benches on which something may wait.
    benches: VecDeque<Arc<Bench>>,
    /// Threads that sleep.
    idle: usize,
    closed: bool,
}

impl Pool {
    /// A pool without threads.
    pub fn new() -> Arc<Pool> {
        Arc::default()
    }

    /// A thread's life, until the pool is closed.
    pub fn work(&self) {
        while let Some((bench, piece)) = self.next() {
            let mut in_hand = InHand {
                bench,
                piece: Some(piece),
            };
            if let Some(piece) = &mut in_hand.piece {
                piece.work();
                self.done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Pieces of work that its threads have done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// No more is taken; the threads end as soon as they have done what they have in hand.
    pub fn close(&self) {
        self.lock().closed = true;
        self.called.notify_all();
    }

    /// Something waits on the bench.
    fn call(&self, bench: &Arc<Bench>) {
        let mut state = self.lock();
        if !state.benches.iter().any(|known| Arc::ptr_eq(known, bench)) {
            state.benches.push_back(bench.clone());
        }
        let idle = state.idle > 0;
        drop(state);
        if idle {
            self.called.notify_one();
        }
    }

    /// What a thread is to do next; sleeps until there is something.
    fn next(&self) -> Option<(Arc<Bench>, Piece)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let Some(bench) = state.benches.pop_front() else {
                state.idle += 1;
                state = self
                    .called
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            let Some((piece, more)) = bench.take_in_hand() else {
                continue;
            };
            if more {
                // Behind the others: each engine gets its turn.
                state.benches.push_back(bench.clone());
                if state.idle > 0 {
                    self.called.notify_one();
                }
            }
            return Some((bench, piece));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one engine has lent.
pub(super) struct Bench {
    pieces: Mutex<Pieces>,
    laid_back: Condvar,
    mailbox: Arc<Mailbox>,
}

#[derive(Default)]
struct Pieces {
    waiting: VecDeque<Piece>,
    in_hand: usize,
    finished: Vec<Piece>,
}

impl Bench {
    fn take_in_hand(&self) -> Option<(Piece, bool)> {
        let mut pieces = self.lock();
        // The engine takes from the front.
        let piece = pieces.waiting.pop_back()?;
        pieces.in_hand += 1;
        Some((piece, !pieces.waiting.is_empty()))
    }

    fn lay_back(&self, piece: Piece) {
        let mut pieces = self.lock();
        pieces.in_hand -= 1;
        pieces.finished.push(piece);
        drop(pieces);
        self.laid_back.notify_all();
        self.mailbox.ring_if_away();
    }

    fn lock(&self) -> MutexGuard<'_, Pieces> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a thread has in hand: laid back in any case, for the engine counts on it.
struct InHand {
    bench: Arc<Bench>,
    piece: Option<Piece>,
}

impl Drop for InHand {
    fn drop(&mut self) {
        if let Some(piece) = self.piece.take() {
            self.bench.lay_back(piece);
        }
    }
}

/// An engine's end of the pool.
pub(super) struct Lending {
    pool: Arc<Pool>,
    bench: Arc<Bench>,
    /// Pieces that are not back.
    lent: usize,
}

impl Lending {
    pub(super) fn new(pool: Arc<Pool>, mailbox: Arc<Mailbox>) -> Lending {
        let bench = Arc::new(Bench {
            pieces: Mutex::default(),
            laid_back: Condvar::new(),
            mailbox,
        });
        Lending {
            pool,
            bench,
            lent: 0,
        }
    }

    /// Have others look at these, too.
    pub(super) fn lend(&mut self, pieces: impl Iterator<Item = Piece>) {
        let mut bench = self.bench.lock();
        let before = bench.waiting.len();
        bench.waiting.extend(pieces);
        self.lent += bench.waiting.len() - before;
        drop(bench);
        self.pool.call(&self.bench);
    }

    /// What others have done, and one that nobody has begun.
    pub(super) fn back(&mut self) -> (Vec<Piece>, Option<Piece>) {
        if self.lent == 0 {
            return (Vec::new(), None);
        }
        let mut bench = self.bench.lock();
        let finished = std::mem::take(&mut bench.finished);
        let waiting = bench.waiting.pop_front();
        self.lent -= finished.len() + usize::from(waiting.is_some());
        (finished, waiting)
    }

    /// Whether there is something that `back` gives.
    pub(super) fn has_news(&self) -> bool {
        self.lent > 0 && {
            let bench = self.bench.lock();
            !bench.finished.is_empty() || !bench.waiting.is_empty()
        }
    }

    /// All of it, when nobody has any in hand any more.
    pub(super) fn all_back(self) -> Vec<Piece> {
        let mut bench = self.bench.lock();
        let mut pieces: Vec<Piece> = bench.waiting.drain(..).collect();
        while bench.in_hand > 0 {
            bench = self
                .bench
                .laid_back
                .wait(bench)
                .unwrap_or_else(PoisonError::into_inner);
        }
        pieces.append(&mut bench.finished);
        pieces
    }
}
