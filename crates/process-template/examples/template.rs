//! A template that listens at the path it is given; its copies do what their words say. For the tests.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on says where"
)]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process;
use std::time::Duration;

use alveole_process_template::{MAX_DESCRIPTORS, Numbers, Template};

fn main() {
    let path = std::env::args_os().nth(1).expect("where to listen");
    let numbers = Numbers::reserve().unwrap();
    let prepared = vec![7_u8; 1 << 20];
    let template = Template::listen(Path::new(&path), numbers).unwrap();
    let Some(words) = template.serve().unwrap() else {
        return;
    };
    let words: Vec<_> = words.iter().map(|w| w.to_str().unwrap()).collect();
    match words[..] {
        ["say", number, what] => {
            let mut file = File::options()
                .write(true)
                .open(format!("/proc/self/fd/{number}"))
                .unwrap();
            let open = fs::read_dir("/proc/self/fd").unwrap();
            let mut open: Vec<i32> = open
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .map(|number| number.parse().unwrap())
                .filter(|number| (3..MAX_DESCRIPTORS).contains(number))
                .collect();
            open.sort_unstable();
            write!(file, "{what} {} {open:?}", prepared[4711]).unwrap();
        }
        ["exit", code] => process::exit(code.parse().unwrap()),
        ["sleep"] => std::thread::sleep(Duration::from_secs(600)),
        ["abort"] => {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGABRT);
        }
        _ => process::exit(99),
    }
}
