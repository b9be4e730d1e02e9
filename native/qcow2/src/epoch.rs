// SPDX-License-Identifier: Apache-2.0
//! When a freed cluster may be used again.
//!
//! A request that was planned before a cluster was freed may still read from it or write into it.
//! Requests therefore enter an epoch and leave it; freeing closes the epoch, and the cluster is
//! released when that epoch and all before it are empty. (The other condition, that what pointed to
//! the cluster is off the disk, is the commit's.)

//!
//! A request that finds no room *waits* for what was freed. It must not wait for itself, so first it moves to the
//! current epoch, when nothing planned for it is under way any more.

use std::collections::VecDeque;

use crate::mailbox::Waiter;

/// The requests under way, by the epoch they entered.
#[derive(Default)]
pub(crate) struct Epochs {
    first: u64,
    counts: VecDeque<u64>,
    waiters: Vec<Waiter>,
}

impl Epochs {
    /// A request begins; the result goes into `leave`.
    pub(crate) fn enter(&mut self) -> u64 {
        if self.counts.is_empty() {
            self.counts.push_back(0);
        }
        if let Some(count) = self.counts.back_mut() {
            *count += 1;
        }
        self.current()
    }

    /// A request has ended.
    pub(crate) fn leave(&mut self, epoch: u64) {
        let place = epoch.saturating_sub(self.first) as usize;
        if let Some(count) = self.counts.get_mut(place) {
            *count = count.saturating_sub(1);
        }
        while self.counts.len() > 1 && self.counts.front() == Some(&0) {
            self.counts.pop_front();
            self.first += 1;
        }
        self.waiters.drain(..).for_each(Waiter::wake);
    }

    /// A request of which nothing is under way now goes on in the current epoch; gives that.
    pub(crate) fn renew(&mut self, epoch: u64) -> u64 {
        if epoch == self.current() {
            return epoch;
        }
        let renewed = self.enter();
        self.leave(epoch);
        renewed
    }

    /// Wake the waiter when a request has ended, or moved to another epoch.
    pub(crate) fn wait(&mut self, waiter: Waiter) {
        self.waiters.push(waiter);
    }

    /// Close the current epoch and give its number.
    pub(crate) fn close(&mut self) -> u64 {
        let closed = self.current();
        if self.counts.back() == Some(&0) && self.counts.len() == 1 {
            self.first += 1;
        } else {
            self.counts.push_back(0);
        }
        closed
    }

    /// Whether nobody is left who entered in `epoch` or before.
    pub(crate) fn passed(&self, epoch: u64) -> bool {
        epoch < self.first || (epoch == self.first && self.counts.iter().all(|count| *count == 0))
    }

    /// Requests under way.
    pub(crate) fn under_way(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn current(&self) -> u64 {
        self.first + (self.counts.len() as u64).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::Epochs;

    #[test]
    fn an_epoch_passes_when_all_who_entered_have_left() {
        let mut epochs = Epochs::default();
        let old = epochs.enter();
        let freed = epochs.close();
        let new = epochs.enter();
        assert!(old <= freed && new > freed);
        assert!(!epochs.passed(freed));
        epochs.leave(new);
        assert!(!epochs.passed(freed));
        epochs.leave(old);
        assert!(epochs.passed(freed));
    }

    #[test]
    fn nobody_under_way_means_passed_at_once() {
        let mut epochs = Epochs::default();
        let freed = epochs.close();
        assert!(epochs.passed(freed));
        let one = epochs.enter();
        epochs.leave(one);
        let freed = epochs.close();
        assert!(epochs.passed(freed));
        assert_eq!(epochs.under_way(), 0);
    }
}
