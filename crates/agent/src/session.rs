//! One session: one thread that waits for all of it at once, so that nothing waits for anything else of it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use alveole_agent_protocol::{
    Answer, Control, Credit, Decoder, Exit, Frame, Hello, MAX_DATA_BYTES, Process, Refusal,
    Request, Stream, Window, from_json, to_json,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::process::{Pid, Signal};
use rustix::time::Timespec;

use crate::clock::{set_clock, step_clock};
use crate::mount::Hidden;
use crate::names::Names;
use crate::parked::Parked;
use crate::process::{self, Running};
use crate::reaper::Reaper;
use crate::{changes, copy, init, metrics, renew, shutdown as ending};

/// How long a client may take to say what it wants, and to take what it was last told.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a client that goes on with a process may be ahead of the end of the connection before: both come with one load of a copy.
const REJOIN_PATIENCE: Duration = Duration::from_secs(5);

/// Output of a process is not read while so much of a session waits to be sent.
const MAX_UNSENT_BYTES: usize = 128 << 10;

/// What all sessions share.
pub(crate) struct Shared {
    pub(crate) reaper: Reaper,
    pub(crate) hidden: OnceLock<Hidden>,
    pub(crate) names: Mutex<Names>,
    pub(crate) parked: Parked,
}

/// Why a session ended before its end.
#[derive(Debug)]
pub(crate) struct Broken(String);

impl<E: std::error::Error> From<E> for Broken {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Serves a connection to its end. `first`: whether it is the one on which the guest is set up.
pub(crate) fn serve(connection: OwnedFd, shared: &Arc<Shared>, first: bool) -> Result<(), Broken> {
    process::nonblocking(&connection)?;
    let mut link = Link {
        connection,
        decoder: Decoder::default(),
        unsent: VecDeque::new(),
    };
    link.say(&Hello::ours())?;
    let until = Instant::now() + PATIENCE;
    let hello: Hello = from_json(&link.message(until)?, "hello")?;
    hello.agree()?;
    let json = link.message(until)?;
    let answer = match from_json::<Request>(&json, "request") {
        Err(e) => Answer::Refused(Refusal {
            code: Refusal::UNKNOWN_REQUEST.into(),
            text: format!(
                "this agent ({}) does not understand it: {e}",
                env!("CARGO_PKG_VERSION")
            ),
        }),
        Ok(Request::Setup(_)) if !first => failed(
            "the guest is set up already: this can be asked once, on the agent's own connection"
                .into(),
        ),
        Ok(Request::Setup(setup)) => done(init::set_up(&setup, shared)),
        Ok(Request::Run(process)) => return run(link, &process, shared),
        Ok(Request::Rejoin { pid }) => return rejoin(link, pid, shared),
        Ok(Request::CopyIn(request)) => return job(link, copy::unpack(request)),
        Ok(Request::CopyOut(request)) => return job(link, copy::pack(request)),
        Ok(Request::Changes(request)) => {
            return job(
                link,
                changes::pack(
                    request,
                    shared.hidden.get().and_then(|h| h.changes.as_ref()),
                ),
            );
        }
        Ok(Request::Metrics) => Answer::Metrics(Box::new(metrics::gather())),
        Ok(Request::SetClock { unix_ns }) => done(set_clock(unix_ns)),
        Ok(Request::StepClock { by_ns }) => match step_clock(by_ns) {
            Ok(unix_ns) => Answer::Clock { unix_ns },
            Err(text) => failed(text),
        },
        Ok(Request::Renew(renewal)) => match renew::renew(&renewal, shared) {
            Ok(renewed) => Answer::Renewed(Box::new(renewed)),
            Err(text) => failed(text),
        },
        Ok(Request::Signal { pid, signal }) => signal_process(shared, pid, signal),
        Ok(Request::Shutdown(request)) => {
            link.say(&Answer::Done)?;
            link.finish();
            let none = Hidden::default();
            ending::shut_down(&request, shared.hidden.get().unwrap_or(&none));
        }
    };
    link.say(&answer)?;
    link.finish();
    Ok(())
}

fn done(result: Result<(), String>) -> Answer {
    result.map_or_else(failed, |()| Answer::Done)
}

fn failed(text: String) -> Answer {
    Answer::Refused(Refusal {
        code: Refusal::FAILED.into(),
        text,
    })
}

fn signal_process(shared: &Shared, pid: u32, signal: u8) -> Answer {
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let (Some(target), Some(signal)) = (target, known_signal(signal)) else {
        return failed(format!("signal {signal} to process {pid}: no such number"));
    };
    match shared.reaper.signal(target, signal) {
        Ok(()) => Answer::Done,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Answer::Refused(Refusal {
            code: Refusal::NOT_FOUND.into(),
            text: format!("no session runs a process {pid}: has it ended?"),
        }),
        Err(e) => failed(format!("cannot signal process {pid}: {e}")),
    }
}

fn known_signal(number: u8) -> Option<Signal> {
    Signal::from_named_raw(i32::from(number))
}

/// How a job ended.
pub(crate) type Outcome = Arc<OnceLock<Answer>>;

/// Something that has streams and an end.
pub(crate) struct Job {
    /// To the guest.
    pub(crate) input: Option<OwnedFd>,
    pub(crate) output: Option<OwnedFd>,
    pub(crate) errors: Option<OwnedFd>,
    /// Readable (at its end) when `outcome` is there.
    pub(crate) ended: OwnedFd,
    pub(crate) outcome: Outcome,
}

/// A process that a session runs, with this end of its streams.
pub(crate) struct Lasting {
    pid: Pid,
    exit: Arc<OnceLock<Exit>>,
    streams: Streams,
    terminal: Option<OwnedFd>,
}

fn number_of(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().cast_unsigned()
}

fn run(mut link: Link, process: &Process, shared: &Arc<Shared>) -> Result<(), Broken> {
    let running = match process::start(process, &shared.reaper) {
        Ok(running) => running,
        Err(refusal) => {
            link.say(&Answer::Refused(refusal))?;
            link.finish();
            return Ok(());
        }
    };
    let Running {
        watched,
        input,
        output,
        errors,
        terminal,
    } = running;
    let lasting = Lasting {
        pid: watched.pid,
        exit: watched.exit,
        streams: Streams::new(
            input,
            Some(output),
            errors,
            watched.ended,
            terminal.is_some(),
        )?,
        terminal,
    };
    if process.outlives_session {
        shared.parked.expect(number_of(lasting.pid));
    }
    carry_process(link, lasting, &[], shared, process.outlives_session)
}

fn rejoin(mut link: Link, pid: u32, shared: &Arc<Shared>) -> Result<(), Broken> {
    let Some(mut lasting) = shared.parked.take(pid, REJOIN_PATIENCE) else {
        link.say(&Answer::Refused(Refusal {
            code: Refusal::NOT_FOUND.into(),
            text: format!("no process {pid} waits for a session"),
        }))?;
        link.finish();
        return Ok(());
    };
    let ended = lasting.streams.begin_anew();
    carry_process(link, lasting, &ended, shared, true)
}

fn carry_process(
    mut link: Link,
    mut lasting: Lasting,
    ended_before: &[Stream],
    shared: &Arc<Shared>,
    outlives: bool,
) -> Result<(), Broken> {
    let Lasting {
        pid,
        exit,
        streams,
        terminal,
    } = &mut lasting;
    let control = |control: Control| match control {
        Control::Resize(size) => {
            if let Some(terminal) = &terminal {
                let _ = process::set_size(terminal, size);
            }
        }
        Control::Signal(number) => {
            if let Some(signal) = known_signal(number) {
                let _ = shared.reaper.signal(*pid, signal);
            }
        }
    };
    let ended = || exit.get().map(|exit| Answer::Exited(*exit));
    let number = number_of(*pid);
    let mut carried = || {
        link.say(&Answer::Started { pid: number })?;
        for stream in ended_before {
            link.push(&Frame::End(*stream));
        }
        carry(&mut link, streams, control, ended)
    };
    let result = carried();
    match (&result, outlives) {
        (Ok(()), true) => shared.parked.forget(number),
        (Ok(()), false) => {}
        (Err(_), true) => shared.parked.put(number, lasting),
        (Err(_), false) => {
            // As at the end of a terminal: who wants to go on ignores it.
            let _ = shared.reaper.signal(*pid, Signal::HUP);
            let _ = shared.reaper.signal(*pid, Signal::CONT);
        }
    }
    result
}

fn job(mut link: Link, job: Result<Job, Refusal>) -> Result<(), Broken> {
    let job = match job {
        Ok(job) => job,
        Err(refusal) => {
            link.say(&Answer::Refused(refusal))?;
            link.finish();
            return Ok(());
        }
    };
    link.say(&Answer::Started { pid: 0 })?;
    let mut streams = Streams::new(job.input, job.output, job.errors, job.ended, false)?;
    carry(&mut link, &mut streams, drop, || job.outcome.get().cloned())
}

/// The streams of a job, and the counts of the protocol.
struct Streams {
    input: Option<OwnedFd>,
    /// What came for it and was not taken.
    unwritten: VecDeque<u8>,
    /// How much of that came over a connection before, to which no credit can be given.
    unwritten_of_before: usize,
    window: Window,
    /// No more comes.
    input_ended: bool,
    /// At its end, a terminal is told by its end-of-file character.
    is_terminal: bool,
    from_guest: [Outgoing; 2],
    ended: Option<OwnedFd>,
}

struct Outgoing {
    stream: Stream,
    fd: Option<OwnedFd>,
    credit: Credit,
}

/// End of transmission, which a terminal in its usual mode takes for the end of its input.
const END_OF_FILE_CHARACTER: u8 = 4;

impl Streams {
    fn new(
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        errors: Option<OwnedFd>,
        ended: OwnedFd,
        is_terminal: bool,
    ) -> io::Result<Self> {
        for fd in [&input, &output, &errors].into_iter().flatten() {
            process::nonblocking(fd)?;
        }
        let outgoing = |stream, fd| Outgoing {
            stream,
            fd,
            credit: Credit::default(),
        };
        Ok(Self {
            input,
            unwritten: VecDeque::new(),
            unwritten_of_before: 0,
            window: Window::default(),
            input_ended: false,
            is_terminal,
            from_guest: [
                outgoing(Stream::Output, output),
                outgoing(Stream::Errors, errors),
            ],
            ended: Some(ended),
        })
    }

    /// Over another connection, which knows nothing of what the one before was told: gives the streams that have ended.
    fn begin_anew(&mut self) -> Vec<Stream> {
        self.unwritten_of_before = self.unwritten.len();
        self.window = Window::default();
        for out in &mut self.from_guest {
            out.credit = Credit::default();
        }
        let ended = self.from_guest.iter().filter(|out| out.fd.is_none());
        ended.map(|out| out.stream).collect()
    }

    /// Counts input that was passed on or thrown away; what may be sent for it, when that is worth saying.
    fn passed(&mut self, bytes: usize) -> Option<u32> {
        let of_before = bytes.min(self.unwritten_of_before);
        self.unwritten_of_before -= of_before;
        self.window.passed(bytes - of_before)
    }

    fn over(&self) -> bool {
        self.ended.is_none() && self.from_guest.iter().all(|out| out.fd.is_none())
    }
}

/// Carries streams until the job has ended and all it wrote is sent, then says how it ended.
fn carry(
    link: &mut Link,
    streams: &mut Streams,
    mut control: impl FnMut(Control),
    outcome: impl Fn() -> Option<Answer>,
) -> Result<(), Broken> {
    while !streams.over() {
        let ready = wait(link, streams)?;
        if ready.connection && !link.receive()? {
            return Err(Broken("the client is gone".into()));
        }
        while let Some(frame) = link.decoder.next()? {
            take(link, streams, frame, &mut control)?;
        }
        if ready.input || streams.input_ended {
            write_input(link, streams)?;
        }
        if ready.ended {
            streams.ended = None;
            // Nobody is there to read it; what still comes is thrown away.
            streams.input = None;
        }
        for at in 0..streams.from_guest.len() {
            if ready.from_guest[at] || streams.ended.is_none() {
                read_output(link, streams, at)?;
            }
        }
        link.flush()?;
    }
    let answer = outcome().unwrap_or_else(|| failed("nobody knows how it ended".into()));
    link.say(&answer)?;
    link.finish();
    Ok(())
}

#[derive(Default)]
struct Ready {
    connection: bool,
    input: bool,
    from_guest: [bool; 2],
    ended: bool,
}

fn wait(link: &Link, streams: &Streams) -> io::Result<Ready> {
    let mut fds = Vec::with_capacity(5);
    let mut who = Vec::with_capacity(5);
    let mut events = PollFlags::IN;
    if !link.unsent.is_empty() {
        events |= PollFlags::OUT;
    }
    fds.push(PollFd::new(&link.connection, events));
    who.push(0);
    if let Some(input) = streams
        .input
        .as_ref()
        .filter(|_| !streams.unwritten.is_empty())
    {
        fds.push(PollFd::new(input, PollFlags::OUT));
        who.push(1);
    }
    for (at, out) in streams.from_guest.iter().enumerate() {
        let may = out.credit.bytes() > 0 && link.unsent.len() < MAX_UNSENT_BYTES;
        if let Some(fd) = out.fd.as_ref().filter(|_| may) {
            fds.push(PollFd::new(fd, PollFlags::IN));
            who.push(2 + at);
        }
    }
    if let Some(ended) = &streams.ended {
        fds.push(PollFd::new(ended, PollFlags::IN));
        who.push(4);
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let mut ready = Ready::default();
    for (fd, who) in fds.iter().zip(who) {
        let happened = fd.revents();
        if happened.is_empty() {
            continue;
        }
        match who {
            0 => ready.connection = happened != PollFlags::OUT,
            1 => ready.input = true,
            4 => ready.ended = true,
            at => ready.from_guest[at - 2] = true,
        }
    }
    Ok(ready)
}

fn take(
    link: &mut Link,
    streams: &mut Streams,
    frame: Frame,
    control: &mut impl FnMut(Control),
) -> Result<(), Broken> {
    match frame {
        Frame::Data(Stream::Input, bytes) => {
            streams.window.came(bytes.len())?;
            if streams.input.is_some() {
                streams.unwritten.extend(bytes);
                write_input(link, streams)?;
            } else if let Some(credit) = streams.window.passed(bytes.len()) {
                link.push(&Frame::Credit(Stream::Input, credit));
            }
        }
        Frame::End(Stream::Input) => {
            streams.input_ended = true;
            if streams.is_terminal {
                streams.unwritten.push_back(END_OF_FILE_CHARACTER);
            }
        }
        Frame::Credit(stream, bytes) => {
            let out = streams
                .from_guest
                .iter_mut()
                .find(|out| out.stream == stream);
            out.ok_or_else(|| Broken("credit for the input, which is not ours to send".into()))?
                .credit
                .add(bytes)?;
        }
        Frame::Data(..) | Frame::End(_) => {
            return Err(Broken("a stream that only the guest sends".into()));
        }
        // What a newer host adds is passed over.
        Frame::Message(json) => {
            if let Ok(known) = from_json(&json, "control") {
                control(known);
            }
        }
    }
    Ok(())
}

fn write_input(link: &mut Link, streams: &mut Streams) -> Result<(), Broken> {
    while !streams.unwritten.is_empty() {
        let Some(input) = &streams.input else { break };
        let (bytes, _) = streams.unwritten.as_slices();
        match rustix::io::write(input, bytes) {
            Ok(written) => {
                streams.unwritten.drain(..written);
                if let Some(credit) = streams.passed(written) {
                    link.push(&Frame::Credit(Stream::Input, credit));
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            // Nobody reads it any more: thrown away, so that the client is not kept waiting.
            Err(_) => streams.input = None,
        }
    }
    if streams.input.is_none() && !streams.unwritten.is_empty() {
        let thrown = streams.unwritten.len();
        streams.unwritten.clear();
        if let Some(credit) = streams.passed(thrown) {
            link.push(&Frame::Credit(Stream::Input, credit));
        }
    }
    if streams.input_ended {
        streams.input = None;
    }
    Ok(())
}

/// Reads what there is, within credit. When the job has ended, what cannot be read at once will not come from it.
fn read_output(link: &mut Link, streams: &mut Streams, at: usize) -> Result<(), Broken> {
    // The kernel hangs up a terminal whose process has ended, behind its last byte, which may not have come through yet.
    let nothing_comes = streams.ended.is_none() && !streams.is_terminal;
    let out = &mut streams.from_guest[at];
    let mut buffer = [0; MAX_DATA_BYTES / 2];
    while let Some(fd) = &out.fd {
        let most = out.credit.bytes().min(buffer.len());
        if most == 0 || link.unsent.len() >= MAX_UNSENT_BYTES {
            return Ok(());
        }
        match rustix::io::read(fd, &mut buffer[..most]) {
            Ok(count) if count > 0 => {
                out.credit.spend(count);
                link.push_data(out.stream, &buffer[..count]);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if !nothing_comes => return Ok(()),
            // Its end; a terminal says EIO when nobody has it open any more.
            _ => {
                out.fd = None;
                link.push(&Frame::End(out.stream));
            }
        }
    }
    Ok(())
}

/// The connection.
struct Link {
    connection: OwnedFd,
    decoder: Decoder,
    unsent: VecDeque<u8>,
}

impl Link {
    fn push(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.unsent.extend(bytes);
    }

    fn push_data(&mut self, stream: Stream, data: &[u8]) {
        let mut bytes = Vec::with_capacity(data.len() + alveole_agent_protocol::HEADER_BYTES);
        Frame::encode_data(stream, data, &mut bytes);
        self.unsent.extend(bytes);
    }

    /// Sends a message, as far as that goes at once.
    fn say(&mut self, message: &impl serde::Serialize) -> Result<(), Broken> {
        self.push(&Frame::Message(to_json(message)?));
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Broken> {
        while !self.unsent.is_empty() {
            let (bytes, _) = self.unsent.as_slices();
            match send(&self.connection, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads once what there is. False: the other side has ended it.
    fn receive(&mut self) -> Result<bool, Broken> {
        let mut buffer = [0; MAX_DATA_BYTES];
        match recv(&self.connection, &mut buffer, RecvFlags::empty()) {
            Ok((0, _)) => Ok(false),
            Ok((count, _)) => {
                self.decoder.push(&buffer[..count]);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    fn wait(&self, events: PollFlags, until: Instant) -> Result<(), Broken> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Broken("the client says nothing".into()));
        }
        let timeout = Timespec::try_from(left).ok();
        match poll(
            &mut [PollFd::new(&self.connection, events)],
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for a message.
    fn message(&mut self, until: Instant) -> Result<Vec<u8>, Broken> {
        loop {
            match self.decoder.next()? {
                Some(Frame::Message(json)) => return Ok(json),
                Some(_) => return Err(Broken("a stream before a request".into())),
                None => {}
            }
            self.flush()?;
            self.wait(PollFlags::IN, until)?;
            if !self.receive()? {
                return Err(Broken("the client is gone".into()));
            }
        }
    }

    /// Sends what is unsent and waits until the other side has taken it, so that closing throws nothing away.
    fn finish(&mut self) {
        let until = Instant::now() + PATIENCE;
        while !self.unsent.is_empty() {
            let sent = self.wait(PollFlags::OUT, until).and_then(|()| self.flush());
            if sent.is_err() {
                return;
            }
        }
        let _ = shutdown(&self.connection, Shutdown::Write);
        while self.wait(PollFlags::IN, until).is_ok() {
            if !self.receive().unwrap_or(false) {
                return;
            }
            // What comes now has no meaning any more, and must not gather.
            self.decoder = Decoder::default();
        }
    }
}
