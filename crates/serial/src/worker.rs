//! The worker on the event loop that serves one console.

use std::sync::{Arc, Mutex, PoisonError};

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::backend::{ROLES, Role, Watches};
use crate::port::{Drained, Port};
use crate::uart::Registers;
use crate::{ConsoleEvent, LINGER, OnConsoleEvent};

const BELL: Token = Token(0);
const TIMER: Token = Token(1);
/// Tokens from here on are roles of the back end.
const FIRST_ROLE: u32 = 2;
const ROLE_LIST: [Role; ROLES] = [Role::Input, Role::Output, Role::Listener];

/// Carries bytes between the UART and the console; to be attached to an event loop.
pub struct ConsoleWorker {
    port: Arc<Mutex<Port>>,
    registers: Registers,
    bell: Arc<EventFd>,
    timer: TimerFd,
    watched: Watches,
    on_event: OnConsoleEvent,
}

impl ConsoleWorker {
    pub(crate) fn new(
        port: Arc<Mutex<Port>>,
        registers: Registers,
        bell: Arc<EventFd>,
        timer: TimerFd,
        on_event: OnConsoleEvent,
    ) -> Self {
        Self {
            port,
            registers,
            bell,
            timer,
            watched: [None; ROLES],
            on_event,
        }
    }

    /// Does all there is to do, whatever the reason for waking up was.
    fn turn(
        &mut self,
        ops: &mut Ops<'_>,
        reason: Option<(Role, Event)>,
    ) -> Result<(), EventLoopError> {
        let port = self.port.clone();
        let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((role, event)) = reason {
            port.backend.on_ready(role, event.ready);
        }
        if port.feed(&self.registers) {
            self.ring();
        }
        // After feeding: a key may ask for the help text.
        let drained = port.drain();
        self.plan_next_turn(drained);
        let result = self.watch(ops, &mut port, drained);
        port.backend.reap();
        let mut events: Vec<ConsoleEvent> = Vec::new();
        while let Some(event) = port.backend.take_event() {
            events.push(event);
        }
        // The owner may flush from its callback.
        drop(port);
        for event in events {
            (self.on_event)(event);
        }
        result
    }

    fn plan_next_turn(&mut self, drained: Drained) {
        match drained {
            Drained::AtRest | Drained::Blocked => {}
            Drained::Empty => {
                // Without the timer the queue would never go to rest: ask the bell instead.
                if self.timer.reset(LINGER, None).is_err() {
                    self.ring();
                }
            }
            Drained::More => self.ring(),
        }
    }

    /// Asks for another turn, after the other workers on the loop have had theirs.
    fn ring(&self) {
        // Fails only with the counter at its maximum: it has been rung already.
        let _ = self.bell.write(1);
    }

    /// Makes the loop watch what the back end asks for now.
    fn watch(
        &mut self,
        ops: &mut Ops<'_>,
        port: &mut Port,
        drained: Drained,
    ) -> Result<(), EventLoopError> {
        let wanted = port
            .backend
            .watches(port.wants_input(), drained == Drained::Blocked);
        let mut result = Ok(());
        for ((role, now), want) in ROLE_LIST.into_iter().zip(&mut self.watched).zip(wanted) {
            let token = Token(FIRST_ROLE + role as u32);
            let same_fd = matches!((&now, &want), (Some((a, _)), Some((b, _))) if a == b);
            if *now == want {
                continue;
            }
            let changed = match want {
                Some((_, interest)) if same_fd => ops.rewatch(token, interest),
                _ => {
                    if now.take().is_some() {
                        // Fails only for a descriptor that was closed under us.
                        let _ = ops.unwatch(token);
                    }
                    want.map_or(Ok(()), |(fd, interest)| ops.watch(&fd, token, interest))
                }
            };
            match changed {
                Ok(()) => *now = want,
                Err(EventLoopError::Watch {
                    always_ready: true, ..
                }) => {
                    port.backend.on_always_ready(role);
                    let _ = self.bell.write(1);
                }
                Err(e) => result = Err(e),
            }
        }
        result
    }
}

impl Worker for ConsoleWorker {
    fn name(&self) -> &'static str {
        "console"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        // Edges need no read, and a timer that was set again meanwhile makes none wait.
        let each_time = Interest::READABLE | Interest::EDGE;
        self.watched = [None; ROLES];
        ops.watch(&*self.bell, BELL, each_time)?;
        ops.watch(&self.timer, TIMER, each_time)?;
        self.turn(ops, None)
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        let role = match event.token {
            BELL | TIMER => None,
            Token(other) => ROLE_LIST
                .into_iter()
                .find(|&r| other == FIRST_ROLE + r as u32),
        };
        // A descriptor that cannot be watched any more (no memory in the host) leaves the console deaf
        // on that side; the guest goes on.
        if let Err(e) = self.turn(ops, role.map(|r| (r, event))) {
            log::debug!("console: {e}");
        }
    }
}
