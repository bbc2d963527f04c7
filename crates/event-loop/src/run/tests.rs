use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::*;
use crate::{Event, Interest, MAX_HANGUP_REPORTS, Token};

const BELL: Token = Token(7);
const PATIENCE: Duration = Duration::from_secs(10);

type Act = Box<dyn FnMut(Event, &EventFd, &mut Ops<'_>) + Send>;

/// Watches one eventfd and does what the test says.
struct Probe {
    bell: EventFd,
    interest: Interest,
    act: Act,
}

impl Worker for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }
    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.bell, BELL, self.interest)
    }
    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        (self.act)(event, &self.bell, ops);
    }
}

fn bell() -> (EventFd, EventFd) {
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    (bell.try_clone().unwrap(), bell)
}

/// A probe that reads its bell and reports the count, and the other end of the bell.
fn reader() -> (EventFd, Receiver<u64>, Box<dyn Worker>) {
    let (ours, bell) = bell();
    let (tell, told) = channel();
    let act = move |_, bell: &EventFd, _: &mut Ops<'_>| tell.send(bell.read().unwrap()).unwrap();
    let probe = Probe {
        bell,
        interest: Interest::READABLE,
        act: Box::new(act),
    };
    (ours, told, Box::new(probe))
}

/// Runs a loop on a thread; gives back the loop when it has stopped.
fn spawn(mut host: EventLoop) -> (LoopHandle, Receiver<EventLoop>) {
    let handle = host.handle();
    let (give, given): (Sender<EventLoop>, _) = channel();
    thread::spawn(move || {
        host.run().unwrap();
        let _ = give.send(host);
    });
    (handle, given)
}

#[test]
fn a_worker_is_called_and_comes_back_as_what_it_was() {
    let (handle, ended) = spawn(EventLoop::new().unwrap());
    let (bell, told, worker) = reader();
    let id = handle.attach(worker).unwrap();
    bell.write(3).unwrap();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(3));
    let worker = handle.detach(id).unwrap();
    bell.write(5).unwrap();
    assert!(told.recv_timeout(Duration::from_millis(30)).is_err());
    let probe: Box<Probe> = worker.downcast().map_err(|_| ()).unwrap();
    assert_eq!(probe.bell.read().unwrap(), 5);
    assert!(matches!(
        handle.detach(id).map(|_| ()),
        Err(EventLoopError::UnknownWorker(_))
    ));
    handle.stop();
    ended.recv_timeout(PATIENCE).unwrap();
    assert!(handle.counters().events.get() >= 1);
}

#[test]
fn a_detached_worker_can_be_attached_again() {
    let mut host = EventLoop::new().unwrap();
    let (bell, told, worker) = reader();
    let id = host.attach(worker).unwrap();
    let worker = host.detach(id).unwrap();
    bell.write(1).unwrap();
    host.attach(worker).unwrap();
    let (handle, _ended) = spawn(host);
    assert_eq!(told.recv_timeout(PATIENCE), Ok(1));
    handle.stop();
}

#[test]
fn orders_given_before_the_loop_runs_wait_for_it() {
    let host = EventLoop::new().unwrap();
    let handle = host.handle();
    let (bell, told, worker) = reader();
    bell.write(1).unwrap();
    let attaching = thread::spawn(move || handle.attach(worker).map(|_| ()));
    thread::sleep(Duration::from_millis(20));
    let (handle, _ended) = spawn(host);
    attaching.join().unwrap().unwrap();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(1));
    handle.stop();
}

#[test]
fn a_stopped_loop_answers_everybody() {
    let (handle, ended) = spawn(EventLoop::new().unwrap());
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let handle = handle.clone();
            thread::spawn(move || while handle.attach(reader().2).is_ok() {})
        })
        .collect();
    thread::sleep(Duration::from_millis(20));
    handle.stop();
    for caller in callers {
        caller.join().unwrap();
    }
    assert!(matches!(
        handle.attach(reader().2),
        Err(EventLoopError::Stopped)
    ));
    // The workers are still inside and can be taken out.
    let mut host = ended.recv_timeout(PATIENCE).unwrap();
    let id = WorkerId(*host.workers.first().unwrap());
    host.detach(id).unwrap();
}

/// A thread may wait in a worker for what never comes, as for a page of guest memory.
#[test]
fn an_abandoned_loop_answers_everybody() {
    let (ours, bell) = bell();
    let (hang, hung) = channel::<()>();
    let (tell, told) = channel();
    let act = move |_, bell: &EventFd, _: &mut Ops<'_>| {
        bell.read().unwrap();
        tell.send(()).unwrap();
        let _ = hung.recv();
    };
    let (handle, ended) = spawn(EventLoop::new().unwrap());
    let id = handle
        .attach(Box::new(Probe {
            bell,
            interest: Interest::READABLE,
            act: Box::new(act),
        }))
        .unwrap();
    ours.write(1).unwrap();
    told.recv_timeout(PATIENCE).unwrap();

    let caller = handle.clone();
    let waiting = thread::spawn(move || caller.detach(id).map(|_| ()));
    thread::sleep(Duration::from_millis(20));
    handle.stop();
    handle.abandon();
    assert!(matches!(
        waiting.join().unwrap(),
        Err(EventLoopError::Stopped)
    ));
    assert!(matches!(
        handle.detach(id).map(|_| ()),
        Err(EventLoopError::Stopped)
    ));
    drop(hang);
    ended.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_dropped_loop_answers_everybody() {
    let host = EventLoop::new().unwrap();
    let handle = host.handle();
    let caller = handle.clone();
    let attaching = thread::spawn(move || caller.attach(reader().2));
    thread::sleep(Duration::from_millis(20));
    drop(host);
    assert!(matches!(
        attaching.join().unwrap(),
        Err(EventLoopError::Stopped)
    ));
    assert!(matches!(
        handle.attach(reader().2),
        Err(EventLoopError::Stopped)
    ));
}

#[test]
fn a_worker_that_waits_for_its_own_loop_is_refused() {
    let host = EventLoop::new().unwrap();
    let handle = host.handle();
    let (ours, bell) = bell();
    let (tell, told) = channel();
    let act = move |_, bell: &EventFd, _: &mut Ops<'_>| {
        bell.read().unwrap();
        tell.send(handle.attach(reader().2)).unwrap();
        handle.stop();
    };
    let (handle, ended) = spawn(host);
    handle
        .attach(Box::new(Probe {
            bell,
            interest: Interest::READABLE,
            act: Box::new(act),
        }))
        .unwrap();
    ours.write(1).unwrap();
    assert!(matches!(
        told.recv_timeout(PATIENCE),
        Ok(Err(EventLoopError::WouldDeadlock))
    ));
    ended.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_worker_may_leave_and_is_dropped() {
    let (handle, _ended) = spawn(EventLoop::new().unwrap());
    let (ours, bell) = bell();
    let (tell, told) = channel::<()>();
    let act = move |_, _: &EventFd, ops: &mut Ops<'_>| {
        let _keeps_the_channel_open_until_the_worker_is_dropped = &tell;
        ops.leave();
    };
    let id = handle
        .attach(Box::new(Probe {
            bell,
            interest: Interest::READABLE,
            act: Box::new(act),
        }))
        .unwrap();
    ours.write(1).unwrap();
    assert_eq!(
        told.recv_timeout(PATIENCE),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
    );
    assert!(matches!(
        handle.detach(id).map(|_| ()),
        Err(EventLoopError::UnknownWorker(_))
    ));
    handle.stop();
}

#[test]
fn an_edge_doorbell_needs_no_read() {
    let (handle, _ended) = spawn(EventLoop::new().unwrap());
    let (ours, bell) = bell();
    let (tell, told) = channel();
    let act = move |_, _: &EventFd, _: &mut Ops<'_>| tell.send(()).unwrap();
    let interest = Interest::READABLE | Interest::EDGE;
    handle
        .attach(Box::new(Probe {
            bell,
            interest,
            act: Box::new(act),
        }))
        .unwrap();
    for _ in 0..3 {
        ours.write(1).unwrap();
        told.recv_timeout(PATIENCE).unwrap();
    }
    assert!(
        told.recv_timeout(Duration::from_millis(30)).is_err(),
        "one event for one write"
    );
    handle.stop();
}

/// Ignores that its socket hangs up.
struct Deaf(UnixStream);

impl Worker for Deaf {
    fn name(&self) -> &'static str {
        "deaf"
    }
    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.0, Token(1), Interest::NONE)
    }
    fn on_event(&mut self, event: Event, _: &mut Ops<'_>) {
        assert!(event.ready.hung_up());
    }
}

#[test]
fn an_ignored_hangup_is_told_and_then_cut() {
    let (handle, _ended) = spawn(EventLoop::new().unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    handle.attach(Box::new(Deaf(theirs))).unwrap();
    drop(ours);
    for _ in 0..1000 {
        if handle.counters().hangups_cut.get() == 1 {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(handle.counters().hangups_cut.get(), 1);
    let rounds = handle.counters().rounds.get();
    assert!(rounds > u64::from(MAX_HANGUP_REPORTS));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        handle.counters().rounds.get(),
        rounds,
        "the loop is quiet again"
    );
    handle.stop();
}

/// Talks on a socket: changes interest, moves to a second descriptor, uses a timer.
struct Talker {
    socket: UnixStream,
    timer: TimerFd,
    seen: Sender<&'static str>,
}

impl Worker for Talker {
    fn name(&self) -> &'static str {
        "talker"
    }
    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.socket, Token(1), Interest::READABLE)?;
        let taken = ops.watch(&self.socket, Token(2), Interest::READABLE);
        assert!(matches!(taken, Err(EventLoopError::Watch { token: 2, .. })));
        let taken = ops.watch(&self.socket, Token(1), Interest::READABLE);
        assert!(matches!(taken, Err(EventLoopError::Watch { token: 1, .. })));
        let unknown = ops.rewatch(Token(9), Interest::NONE);
        assert!(matches!(
            unknown,
            Err(EventLoopError::UnknownToken { token: 9, .. })
        ));
        Ok(())
    }
    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        let seen = match (event.token, event.ready) {
            (Token(1), r) if r.writable() => {
                ops.unwatch(Token(1)).unwrap();
                ops.watch(&self.timer, Token(3), Interest::READABLE)
                    .unwrap();
                self.timer.reset(Duration::from_millis(1), None).unwrap();
                "writable"
            }
            (Token(1), r) if r.readable() => {
                ops.rewatch(Token(1), Interest::WRITABLE).unwrap();
                "readable"
            }
            (Token(3), _) => {
                self.timer.wait().unwrap();
                ops.leave();
                "timer"
            }
            _ => "unexpected",
        };
        self.seen.send(seen).unwrap();
    }
}

#[test]
fn interest_and_descriptors_change_at_run_time() {
    let (handle, _ended) = spawn(EventLoop::new().unwrap());
    let (mut ours, socket) = UnixStream::pair().unwrap();
    let (seen, told) = channel();
    handle
        .attach(Box::new(Talker {
            socket,
            timer: TimerFd::new().unwrap(),
            seen,
        }))
        .unwrap();
    ours.write_all(b"x").unwrap();
    for want in ["readable", "writable", "timer"] {
        assert_eq!(told.recv_timeout(PATIENCE), Ok(want));
    }
    assert!(told.recv_timeout(PATIENCE).is_err(), "the worker has left");
    handle.stop();
}

/// Wants to watch a regular file.
struct OnFile(std::fs::File);

impl Worker for OnFile {
    fn name(&self) -> &'static str {
        "on-file"
    }
    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.0, Token(1), Interest::READABLE)
    }
    fn on_event(&mut self, _: Event, _: &mut Ops<'_>) {}
}

#[test]
fn a_worker_that_cannot_start_is_not_attached() {
    let mut host = EventLoop::new().unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let e = host.attach(Box::new(OnFile(file))).unwrap_err();
    assert!(
        matches!(
            e,
            EventLoopError::Watch {
                always_ready: true,
                ..
            }
        ),
        "{e}"
    );
    assert!(e.to_string().contains("on-file"), "{e}");
    assert!(host.workers.is_empty());
}
