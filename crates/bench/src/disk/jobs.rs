//! Does the jobs of one column: fio in a guest or on the host, and what it reports.
//!
//! Knows the lines of `resources/guest/bench-disk` and fio's JSON; does not know command lines of VMMs, nor
//! how results are shown.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::columns::{Cache, Column, Measure, Who};
use crate::machine::Machine;
use crate::run::{Run, cpu_seconds};
use crate::vmm::Vmm;

/// One way of using a disk.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    /// Jobs of one number are done in one guest, in turn.
    guest: usize,
}

const fn job(
    guest: usize,
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
) -> Job {
    Job {
        name,
        rw,
        block,
        depth,
        guest,
    }
}

/// Reads come first: what is written may still be on its way to the host's disk when a job is over.
///
/// Memory that a fresh guest gives out is scattered, so that a long request has many ranges; when a job has
/// run, the next one may find memory in one piece. So sequential jobs have guests of their own and are done
/// twice in them.
pub(super) const JOBS: [Job; 7] = [
    job(0, "randread-qd1", "randread", "4k", 1),
    job(0, "randread-qd32", "randread", "4k", 32),
    job(0, "randwrite-qd32", "randwrite", "4k", 32),
    job(1, "seqread-128k", "read", "128k", 8),
    job(1, "seqread-128k-again", "read", "128k", 8),
    job(2, "seqwrite-128k", "write", "128k", 8),
    job(2, "seqwrite-128k-again", "write", "128k", 8),
];

/// What `--jobs` may name.
pub(super) fn job_names() -> Vec<&'static str> {
    JOBS.iter().map(|job| job.name).collect()
}

/// The jobs of these names, by number, in their order; all where there is no name.
pub(super) fn chosen(names: &[String]) -> Vec<usize> {
    let all = JOBS.iter().enumerate();
    all.filter(|(_, job)| names.is_empty() || names.iter().any(|name| name == job.name))
        .map(|(at, _)| at)
        .collect()
}

/// What the guest's lines begin with.
const PREFIX: &str = "disk-bench: ";
/// How a run of all jobs is done.
pub(super) struct Plan {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) image: PathBuf,
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    pub(super) arguments: String,
    pub(super) seconds: u32,
    /// Which of [`JOBS`] are done.
    pub(super) jobs: Vec<usize>,
    /// What boots, fills and writes may take on top of the jobs.
    pub(super) patience: Duration,
    pub(super) scratch: PathBuf,
}

type Samples = Vec<((usize, Measure), f64)>;

impl Plan {
    /// All jobs once.
    ///
    /// # Errors
    /// What went wrong, in one sentence.
    pub(super) fn run(&self, column: &Column) -> Result<Samples, String> {
        match &column.who {
            Who::Host => self.on_host(column),
            Who::Guest(vmm) if column.overlay => {
                let overlay = self.image.with_extension("overlay.qcow2");
                let _ = fs::remove_file(&overlay);
                alveole_block_store::tools::create_overlay(
                    &overlay,
                    &self.image,
                    alveole_block_store::Format::Raw,
                )
                .map_err(|e| e.to_string())?;
                let outcome = self.in_guests(column, vmm, &overlay);
                let _ = fs::remove_file(&overlay);
                outcome
            }
            Who::Guest(vmm) => self.in_guests(column, vmm, &self.image),
        }
    }

    fn in_guests(&self, column: &Column, vmm: &Vmm, disk: &Path) -> Result<Samples, String> {
        let mut samples = Vec::new();
        let mut fill = column.overlay;
        for jobs in self.jobs.chunk_by(|a, b| JOBS[*a].guest == JOBS[*b].guest) {
            samples.extend(self.in_guest(jobs, fill, column, vmm, disk)?);
            fill = false;
        }
        Ok(samples)
    }

    fn in_guest(
        &self,
        jobs: &[usize],
        fill: bool,
        column: &Column,
        vmm: &Vmm,
        disk: &Path,
    ) -> Result<Samples, String> {
        let image = settle(&self.image, column.cache)?;
        let jobs: Vec<_> = jobs
            .iter()
            .map(|at| &JOBS[*at])
            .map(|j| format!("{}:{}:{}:{}", j.name, j.rw, j.block, j.depth))
            .collect();
        let fill = if fill { "yes" } else { "no" };
        let line = format!(
            "{} alveole.do=run:/bench-disk bench_seconds={} bench_fill={fill} bench_jobs={}",
            self.arguments,
            self.seconds,
            jobs.join(",")
        );
        let machine = Machine {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            device: column.disk(disk),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            line,
        };
        let words = column
            .arguments(vmm, &machine, &self.scratch)
            .map_err(|e| format!("{e:#}"))?;
        let timeout = self.patience + self.jobs_time() * 2;
        let stderr = self.scratch.join("stderr");
        let mut run = Run::start(vmm.path.as_os_str(), &words, &stderr, timeout)
            .map_err(|e| format!("{e:#}"))?;
        let written = if column.overlay {
            File::open(disk).map_err(|e| e.to_string())?
        } else {
            image
        };
        let mut samples = Vec::new();
        let (mut at, mut before, mut busy) = (0, 0.0, 0.0);
        loop {
            let line = run.line()?;
            let Some((_, said)) = line.split_once(PREFIX) else {
                continue;
            };
            let (word, rest) = said.split_once(' ').unwrap_or((said, ""));
            match word {
                "begin" => {
                    let found = JOBS.iter().position(|job| job.name == rest);
                    at = found.ok_or_else(|| format!("the guest began {rest:?}"))?;
                    before = cpu_seconds(run.id())?;
                }
                "end" => {
                    busy = cpu_seconds(run.id())? - before;
                    // In the time in which the guest waits.
                    written.sync_all().map_err(|e| e.to_string())?;
                }
                "report" => samples.extend(read_report(at, rest, Some(busy))?),
                "failed:" => return Err(run.failure(said)),
                // The guest has nothing more to say: dropped, the run is ended.
                "done" => return Ok(samples),
                _ => {}
            }
        }
    }

    fn on_host(&self, column: &Column) -> Result<Samples, String> {
        let direct = column.cache == Cache::Direct;
        let mut samples = Vec::new();
        for &at in &self.jobs {
            let job = &JOBS[at];
            let image = settle(&self.image, column.cache)?;
            let report = self.scratch.join("fio");
            let words = format!(
                "--name=job --ioengine=libaio --direct={} --thread --output-format=json --invalidate=0 \
                 --percentile_list=50:99 --norandommap --lat_percentiles=1 --clat_percentiles=0 --time_based --rw={} --bs={} --iodepth={} --runtime={}",
                u8::from(direct),
                job.rw,
                job.block,
                job.depth,
                self.seconds
            );
            let mut words: Vec<OsString> = words.split_whitespace().map(Into::into).collect();
            let mut named = OsString::from("--filename=");
            named.push(&self.image);
            words.push(named);
            let said = Command::new("fio")
                .args(words)
                .arg("--output")
                .arg(&report)
                .output()
                .map_err(|e| format!("cannot run fio: {e}"))?;
            if !said.status.success() {
                let errors = String::from_utf8_lossy(&said.stderr);
                return Err(format!(
                    "fio: {}",
                    errors.lines().last().unwrap_or_default()
                ));
            }
            let text = fs::read_to_string(&report).map_err(|e| e.to_string())?;
            samples.extend(read_report(at, &text, None)?);
            image.sync_all().map_err(|e| e.to_string())?;
        }
        Ok(samples)
    }

    fn jobs_time(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds) + 1) * self.jobs.len() as u32
    }
}

/// Has all of the image in the page cache, or nothing.
fn settle(image: &Path, cache: Cache) -> Result<File, String> {
    let said = |e: std::io::Error| format!("{}: {e}", image.display());
    let mut file = File::open(image).map_err(said)?;
    file.sync_all().map_err(said)?;
    match cache {
        Cache::Buffered => {
            std::io::copy(&mut file, &mut std::io::sink()).map_err(said)?;
        }
        Cache::Direct => {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
                .map_err(|e| said(e.into()))?;
        }
    }
    Ok(file)
}

/// What fio says of job `at`; `busy` are the seconds of its process, if they are not fio's own.
fn read_report(at: usize, text: &str, busy: Option<f64>) -> Result<Samples, String> {
    // fio may write notes before its JSON.
    let text = text
        .find('{')
        .and_then(|start| text.get(start..))
        .unwrap_or_default();
    let report: Value = serde_json::from_str(text).map_err(|e| format!("fio's report: {e}"))?;
    let job = &report["jobs"][0];
    let side = if job["read"]["total_ios"].as_u64().unwrap_or(0) > 0 {
        &job["read"]
    } else {
        &job["write"]
    };
    let number = |value: &Value, name: &str| {
        let found = value[name].as_f64();
        found.ok_or_else(|| format!("fio's report has no {name}"))
    };
    let ios = number(side, "total_ios")?;
    if ios < 1.0 {
        return Err("fio did nothing".into());
    }
    let latency = &side["lat_ns"]["percentile"];
    let busy = match busy {
        Some(busy) => busy,
        None => {
            let percent = number(job, "usr_cpu")? + number(job, "sys_cpu")?;
            percent / 100.0 * number(side, "runtime")? / 1000.0
        }
    };
    Ok(vec![
        ((at, Measure::KiloIops), number(side, "iops")? / 1000.0),
        ((at, Measure::MegaBytes), number(side, "bw_bytes")? / 1e6),
        (
            (at, Measure::Median),
            number(latency, "50.000000")? / 1000.0,
        ),
        (
            (at, Measure::Slowest),
            number(latency, "99.000000")? / 1000.0,
        ),
        ((at, Measure::Cpu), busy * 100_000.0 / ios),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_fio() {
        let text = r#"fio: note
            {"jobs":[{"usr_cpu":10.0,"sys_cpu":15.0,"read":{"total_ios":0},"write":{"total_ios":2000,
            "iops":1000.5,"bw_bytes":4098048,"runtime":2000,
            "lat_ns":{"percentile":{"50.000000":30000,"99.000000":90000}}}}]}"#;
        let samples = read_report(3, text, None).unwrap();
        let of = |measure| samples.iter().find(|s| s.0 == (3, measure)).unwrap().1;
        assert_eq!(of(Measure::KiloIops), 1.0005);
        assert_eq!((of(Measure::Median), of(Measure::Slowest)), (30.0, 90.0));
        assert_eq!(of(Measure::Cpu), 25.0);
        let samples = read_report(3, text, Some(1.0)).unwrap();
        assert!(samples.contains(&((3, Measure::Cpu), 50.0)));
        assert!(read_report(0, "", None).is_err());
        assert!(read_report(0, "{}", None).is_err());
    }

    #[test]
    fn guest_and_host_agree_on_the_lines() {
        let script = include_str!("../../../../resources/guest/bench-disk");
        for want in [
            "echo \"disk-bench: $*\"",
            "say \"begin ",
            "say \"end ",
            "say \"report ",
            "say \"done\"",
        ] {
            assert!(script.contains(want), "{want}");
        }
    }
}
