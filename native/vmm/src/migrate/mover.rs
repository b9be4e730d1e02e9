// SPDX-License-Identifier: Apache-2.0
//! The thread that migrates: made with the machine, since none is later, and asleep until it is told.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::copies::Still;
use super::link::Link;
use super::receive::Receiver;
use super::rounds::Sender;
use super::{Order, Progress, Sent, Step};
use crate::cpu::gate::Gate;
use crate::error::{Error, Result};
use crate::mailbox::{Mail, Mailbox, Queue};
use crate::memory::GuestMemoryMmap;
use crate::slots::Slots;
use crate::thread::{panic_message, spawn, Role, ThreadHook};

/// What the thread works with.
#[derive(Clone)]
pub(crate) struct Tools {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) slots: Arc<Slots>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) still: Still,
}

impl Tools {
    pub(crate) fn tell(&self, step: Step) {
        self.mailbox.inbox.push(Mail::Move(step));
    }
}

/// The thread. Dropping this breaks off what it does and ends it.
pub(crate) struct Mover {
    orders: Arc<Queue<Order>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Mover {
    /// # Errors
    /// `Unavailable` when the kernel gives no thread.
    pub(crate) fn new(tools: Tools, hook: &ThreadHook) -> Result<Mover> {
        let orders = Arc::new(Queue::new()?);
        let ours = Arc::clone(&orders);
        let thread = spawn("migration", Role::Migration, hook, move || {
            live(&ours, &tools)
        })?;
        Ok(Mover {
            orders,
            thread: Some(thread),
        })
    }

    /// Never waits.
    pub(crate) fn order(&self, order: Order) {
        self.orders.push(order);
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.orders.push(Order::Exit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn live(orders: &Arc<Queue<Order>>, tools: &Tools) {
    loop {
        let exit = match orders.pop() {
            Some(Order::Exit) => true,
            Some(order) => carry_out(order, orders, tools),
            None => {
                sleep(orders);
                false
            }
        };
        if exit {
            return;
        }
    }
}

fn sleep(orders: &Queue<Order>) {
    let mut fd = libc::pollfd {
        fd: orders.fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, ours.
    unsafe { libc::poll(&mut fd, 1, -1) };
}

/// True when the thread is to end.
fn carry_out(order: Order, orders: &Arc<Queue<Order>>, tools: &Tools) -> bool {
    use std::panic::{catch_unwind, AssertUnwindSafe};
    let bug = |panic: &(dyn std::any::Any + Send)| Error::internal(panic_message(panic));
    match order {
        Order::Send(job) => {
            let mut exit = false;
            let sent = catch_unwind(AssertUnwindSafe(|| {
                let link = Link::new(job.socket, Arc::clone(orders));
                let pace = (job.downtime, job.bandwidth);
                let copies = job.copies;
                let sender = link.and_then(|link| Sender::new(link, tools.clone(), pace, copies));
                let mut sender = match sender {
                    Ok(sender) => sender,
                    Err(error) => return Sent::Stays(error),
                };
                let sent = sender.send(&job.facts, &job.roms);
                exit = sender.exits();
                sent
            }));
            // A bug that is met after the machine was given away must not bring it back.
            tools.tell(Step::Sent(
                sent.unwrap_or_else(|panic| Sent::Unsure(bug(panic.as_ref()))),
            ));
            exit
        }
        Order::Receive(job) => {
            let mut exit = false;
            let received = catch_unwind(AssertUnwindSafe(|| {
                let link = Link::new(job.socket, Arc::clone(orders))?;
                let mut receiver = Receiver::new(link, tools.clone());
                let received = receiver.receive(&job.expected);
                exit = receiver.exits();
                received
            }));
            let received = received.unwrap_or_else(|panic| Err(bug(panic.as_ref())));
            tools.tell(Step::Received(received));
            exit
        }
        // About a job that has ended.
        Order::Stands | Order::Last(_) | Order::Loaded(_) | Order::Runs(_) | Order::Cancel(_) => {
            false
        }
        Order::Exit => true,
    }
}
