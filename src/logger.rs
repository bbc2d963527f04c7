//! Log lines to a file or to standard error, in Firecracker's format:
//! `2026-01-31T12:00:00.123456789 [id:thread:LEVEL:file:line] text`.
//!
//! The one mutable global of the program (the `log` facade asks for it). A line that cannot be written (a
//! full disk) is dropped and counted: logging must never stop the guest. The next line that can be written
//! is preceded by the number of lost ones; if none can, standard error gets the number at the end. Lines of one place are limited
//! ([`crate::log_limit`]), unless a client of the API causes them.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Instant, SystemTime};

use crate::log_limit::LogLimit;
use alveole_vm_config::{self as config, LogLevel};
use log::{LevelFilter, Log, Metadata, Record};

/// What is written, and how.
struct Settings {
    /// None: standard error.
    file: Option<File>,
    id: String,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

struct Logger {
    settings: RwLock<Settings>,
    lost_lines: AtomicU64,
    limit: Mutex<LogLimit>,
    /// All that were ever lost, and left out.
    all_lost: AtomicU64,
    all_left_out: AtomicU64,
}

/// Whose lines are not limited: who asks for them is trusted.
const UNLIMITED: &str = "alveole_api_server";

/// How many lines were lost, and how many left out, since the start.
pub(crate) fn counts() -> (u64, u64) {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (count(&LOGGER.all_lost), count(&LOGGER.all_left_out))
}

static LOGGER: Logger = Logger::new();

/// Starts logging, to standard error, by this name of the machine.
pub(crate) fn start(id: &str) {
    LOGGER.write().id = id.to_owned();
    log::set_max_level(LevelFilter::Warn);
    // Fails only the second time.
    let _ = log::set_logger(&LOGGER);
}

/// Changes what `wanted` names. A refused system call is reported to the same file.
///
/// # Errors
/// The log file cannot be opened; nothing is changed.
pub(crate) fn change(wanted: &config::Logger) -> Result<(), String> {
    let file = wanted.log_path.as_deref().map(open).transpose()?;
    if let Some(file) = &file {
        alveole_thread_sandbox::set_report_log(file.as_raw_fd());
    }
    let mut settings = LOGGER.write();
    if file.is_some() {
        settings.file = file;
    }
    if let Some(show) = wanted.show_level {
        settings.show_level = show;
    }
    if let Some(show) = wanted.show_log_origin {
        settings.show_origin = show;
    }
    if wanted.module.is_some() {
        settings.module.clone_from(&wanted.module);
    }
    if let Some(level) = wanted.level {
        log::set_max_level(match level {
            LogLevel::Off => LevelFilter::Off,
            LogLevel::Error => LevelFilter::Error,
            LogLevel::Warning => LevelFilter::Warn,
            LogLevel::Info => LevelFilter::Info,
            LogLevel::Debug => LevelFilter::Debug,
            LogLevel::Trace => LevelFilter::Trace,
        });
    }
    Ok(())
}

/// Opens a file or a named pipe to append to.
pub(crate) fn open(path: &Path) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options
        .create(true)
        .append(true)
        .mode(0o600)
        // Writing to a pipe that is full is an error, not a wait.
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits());
    options
        .open(path)
        .or_else(|e| match e.raw_os_error() {
            // A named pipe which nobody reads yet. As in Firecracker it is held open for reading, too: what is written
            // waits for its reader, and one that goes does not take it away.
            Some(nix::libc::ENXIO) => options.read(true).open(path),
            _ => Err(e),
        })
        .map_err(|e| {
            let hint = match e.kind() {
                io::ErrorKind::NotFound => "; does its directory exist?",
                io::ErrorKind::PermissionDenied => "; may this user write there?",
                io::ErrorKind::IsADirectory => "; name a file in it",
                _ => "",
            };
            format!("cannot open {path:?} to write to: {e}{hint}")
        })
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.read().wants(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let settings = self.read();
        if !settings.wants(record.metadata()) {
            return;
        }
        let Some(left_out) = self.may_write(record) else {
            self.all_left_out.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let line = settings.format(record, left_out);
        let lost = self.lost_lines.swap(0, Ordering::Relaxed);
        let mut text = String::new();
        if lost > 0 {
            text = format!("alveole-vmm: {lost} log lines before this one could not be written\n");
        }
        text.push_str(&line);
        // One write for one line: the file is open to append, so lines of several threads never mix.
        let written = match &settings.file {
            Some(file) => { file }.write_all(text.as_bytes()).is_ok(),
            None => io::stderr().write_all(text.as_bytes()).is_ok(),
        };
        if !written {
            self.lost_lines.fetch_add(lost + 1, Ordering::Relaxed);
            self.all_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Nothing is buffered. Says what was lost for good.
    fn flush(&self) {
        let lost = self.lost_lines.swap(0, Ordering::Relaxed);
        if lost > 0 && self.read().file.is_some() {
            crate::exit::say(&format!(
                "{lost} log lines could not be written; is the disk full?"
            ));
        }
    }
}

impl Logger {
    /// To standard error, of a machine without a name.
    const fn new() -> Self {
        Self {
            settings: RwLock::new(Settings {
                file: None,
                id: String::new(),
                show_level: false,
                show_origin: false,
                module: None,
            }),
            lost_lines: AtomicU64::new(0),
            limit: Mutex::new(LogLimit::new()),
            all_lost: AtomicU64::new(0),
            all_left_out: AtomicU64::new(0),
        }
    }

    /// Whether a line may be written, and how many of its place were left out before it.
    fn may_write(&self, record: &Record<'_>) -> Option<u64> {
        let (Some(file), Some(line)) = (record.file_static(), record.line()) else {
            return Some(0);
        };
        if record.target().starts_with(UNLIMITED) {
            return Some(0);
        }
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        limit.ask((file, line), Instant::now())
    }

    fn read(&self) -> RwLockReadGuard<'_, Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Settings> {
        self.settings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Settings {
    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        if self.file.is_none() && metadata.target() == crate::exit::LOG_TARGET {
            return false;
        }
        self.module
            .as_ref()
            .is_none_or(|m| metadata.target().starts_with(m.as_str()))
    }

    fn format(&self, record: &Record<'_>, left_out: u64) -> String {
        let thread = std::thread::current();
        let mut head = format!(
            "{} [{}:{}",
            timestamp(),
            self.id,
            thread.name().unwrap_or("-")
        );
        if self.show_level {
            head.push_str(&format!(":{}", record.level()));
        }
        if self.show_origin {
            head.push_str(&format!(
                ":{}:{}",
                record.file().unwrap_or("?"),
                record.line().unwrap_or(0)
            ));
        }
        // A guest-made text must not be able to forge a second line.
        let text = record.args().to_string().replace('\n', "\n    ");
        let before = match left_out {
            0 => String::new(),
            n => format!("({n} lines like this were left out) "),
        };
        format!("{head}] {before}{text}\n")
    }
}

/// Now, in UTC, with nanoseconds.
fn timestamp() -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (days, second) = (now.as_secs() / 86_400, now.as_secs() % 86_400);
    let (year, month, day) = civil_date(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}",
        second / 3600,
        second / 60 % 60,
        second % 60,
        now.subsec_nanos()
    )
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that the leap day is the last of its year; 400 years have 146,097 days.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_454, (2026, 1, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil_date(days), date, "{days}");
        }
        assert_eq!(timestamp().len(), "2026-01-31T12:00:00.123456789".len());
    }

    #[test]
    fn a_line_stays_one_entry() {
        let logger = Settings {
            file: None,
            id: "x".into(),
            show_level: true,
            show_origin: false,
            module: Some("alveole".into()),
        };
        let record = Record::builder()
            .args(format_args!("a\nb"))
            .level(log::Level::Warn)
            .build();
        let line = logger.format(&record, 0);
        assert!(line.ends_with(":WARN] a\n    b\n"), "{line}");
        assert!(
            !logger.wants(record.metadata()),
            "another module is filtered out"
        );
    }

    #[test]
    fn a_place_that_complains_for_ever_is_left_out() {
        let path = std::env::temp_dir().join(format!("alveole-log-{}", std::process::id()));
        let logger = Logger::new();
        logger.write().file = Some(open(&path).unwrap());
        let say = |target: &str, times: u32| {
            for _ in 0..times {
                let mut record = Record::builder();
                record
                    .target(target)
                    .file_static(Some("x.rs"))
                    .line(Some(7));
                logger.log(&record.args(format_args!("again")).build());
            }
        };
        say("alveole_virtio_net", 1000);
        // Who may ask for each of its lines gets them.
        say("alveole_api_server::conversation", 50);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let most = crate::log_limit::MOST_LINES;
        assert_eq!(text.lines().count(), most as usize + 50);
        assert_eq!(logger.all_left_out.into_inner(), u64::from(1000 - most));
    }
}
