//! The text that is scraped: OpenMetrics 1.0, or the text format 0.0.4 that it came of.

use std::collections::BTreeMap;
use std::fmt::Write;

use alveole_counters::{Gathered, GatheredHistograms, Observed};

use crate::families::{component_label, family, is_left_out};
use crate::process::ProcessFacts;

const PROGRAM: &str = "alveole";

/// Which of the two texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// `text/plain; version=0.0.4`: what everybody reads.
    #[default]
    Text,
    /// `application/openmetrics-text; version=1.0.0`: for who asks for it.
    OpenMetrics,
}

impl Form {
    /// The form that a client asks for by its `Accept` header.
    #[must_use]
    pub fn accepted(header: &str) -> Self {
        if header.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// What the answer says it is.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What is no counter. What is not known is left out.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    /// Name of the machine.
    pub id: String,
    /// Version of this program.
    pub version: String,
    /// State of the machine, as the API tells it.
    pub state: String,
    /// Memory that the guest was given, in bytes.
    pub guest_memory_bytes: Option<u64>,
    /// From the start of this process to the first instruction of the guest, in microseconds.
    pub first_instruction_us: Option<u64>,
    /// From the start of this process to the guest's sign that it has booted, in microseconds.
    pub booted_us: Option<u64>,
}

/// Families by name, each with its members as they are written.
#[derive(Default)]
struct Families {
    all: BTreeMap<String, (&'static str, &'static str, Vec<String>)>,
}

impl Families {
    fn add(&mut self, name: &str, kind: &'static str, help: &'static str, member: String) {
        let family = self.all.entry(name.to_owned());
        let (_, _, members) = family.or_insert_with(|| (kind, help, Vec::new()));
        members.push(member);
    }

    fn counter(&mut self, name: &str, help: &'static str, labels: &[(&str, &str)], value: &str) {
        let member = format!("{PROGRAM}_{name}_total{} {value}", braces(labels));
        self.add(name, "counter", help, member);
    }

    fn gauge(&mut self, name: &str, help: &'static str, labels: &[(&str, &str)], value: &str) {
        let member = format!("{PROGRAM}_{name}{} {value}", braces(labels));
        self.add(name, "gauge", help, member);
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &'static str,
        labels: &[(&str, &str)],
        seen: &Observed,
    ) {
        let name_all = format!("{PROGRAM}_{name}");
        let bucket = |bound: &str, count: u64| {
            let mut labels = labels.to_vec();
            labels.push(("le", bound));
            format!("{name_all}_bucket{} {count}", braces(&labels))
        };
        let mut members: Vec<_> = seen
            .upto
            .iter()
            .map(|(bound_ns, count)| bucket(&seconds(*bound_ns), *count))
            .collect();
        members.push(bucket("+Inf", seen.count));
        members.push(format!(
            "{name_all}_sum{} {}",
            braces(labels),
            seconds(seen.sum_ns)
        ));
        members.push(format!("{name_all}_count{} {}", braces(labels), seen.count));
        for member in members {
            self.add(name, "histogram", help, member);
        }
    }

    fn text(&self, form: Form) -> String {
        let mut text = String::new();
        for (name, (kind, help, members)) in &self.all {
            let suffix = if *kind == "counter" && form == Form::Text {
                "_total"
            } else {
                ""
            };
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP {PROGRAM}_{name}{suffix} {help}");
            let _ = writeln!(text, "# TYPE {PROGRAM}_{name}{suffix} {kind}");
            for member in members {
                let _ = writeln!(text, "{member}");
            }
        }
        if form == Form::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

fn braces(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let pairs = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
    format!("{{{}}}", pairs.collect::<Vec<_>>().join(","))
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Nanoseconds as seconds, without loss.
fn seconds(ns: u64) -> String {
    let (whole, part) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let text = format!("{whole}.{part:09}");
    let short = text.trim_end_matches('0');
    if short.ends_with('.') {
        format!("{short}0")
    } else {
        short.to_owned()
    }
}

/// The text with everything in it, families by name.
#[must_use]
pub fn exposition(
    form: Form,
    gauges: &Gauges,
    counters: &[Gathered],
    histograms: &[GatheredHistograms],
    process: Option<&ProcessFacts>,
) -> String {
    let mut families = Families::default();
    add_gauges(&mut families, gauges);
    for (component, counters) in counters {
        let (kind, id) = component.split_once(' ').unwrap_or((component, ""));
        for (counter, count) in counters {
            if is_left_out(kind, counter) {
                continue;
            }
            let mut labels = Vec::new();
            if !id.is_empty() {
                labels.push((component_label(kind), id));
            }
            let count = count.to_string();
            match family(kind, counter) {
                Some(known) => {
                    labels.extend(known.label);
                    families.counter(known.name, known.help, &labels, &count);
                }
                None => {
                    let name = plain_name(&format!("{kind}_{counter}"));
                    families.counter(&name, "A counter of this component.", &labels, &count);
                }
            }
        }
    }
    for (component, seen) in histograms {
        let (kind, id) = component.split_once(' ').unwrap_or((component, ""));
        for (what, seen) in seen {
            let mut labels = vec![("operation", what.as_str())];
            if !id.is_empty() {
                labels.insert(0, (component_label(kind), id));
            }
            let name = plain_name(&format!("{kind}_latency_seconds"));
            let help = "From the moment that a request was taken to that of its completion.";
            families.histogram(&name, help, &labels, seen);
        }
    }
    if let Some(process) = process {
        add_process(&mut families, process);
    }
    families.text(form)
}

fn plain_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    name.chars().map(plain).collect()
}

fn add_gauges(families: &mut Families, gauges: &Gauges) {
    let Gauges {
        id,
        version,
        state,
        guest_memory_bytes,
        first_instruction_us,
        booted_us,
    } = gauges;
    families.gauge(
        "build_info",
        "Version of this program, and name of the machine.",
        &[("version", version), ("id", id)],
        "1",
    );
    families.gauge(
        "machine_state",
        "State of the machine; the one that it is in is 1.",
        &[("state", state)],
        "1",
    );
    if let Some(bytes) = guest_memory_bytes {
        let help = "Memory that the guest was given.";
        families.gauge("guest_memory_bytes", help, &[], &bytes.to_string());
    }
    for (name, help, us) in [
        (
            "boot_first_instruction_seconds",
            "From the start of this process to the first instruction of the guest.",
            first_instruction_us,
        ),
        (
            "boot_ready_seconds",
            "From the start of this process to the guest's sign that it has booted.",
            booted_us,
        ),
    ] {
        if let Some(us) = us {
            families.gauge(name, help, &[], &seconds(us.saturating_mul(1000)));
        }
    }
}

fn add_process(families: &mut Families, process: &ProcessFacts) {
    for (name, help, bytes) in [
        (
            "process_resident_memory_bytes",
            "Memory of this process that is in RAM.",
            process.resident_bytes,
        ),
        (
            "process_proportional_memory_bytes",
            "The same, with what is shared divided among those who share it.",
            process.proportional_bytes,
        ),
    ] {
        if let Some(bytes) = bytes {
            families.gauge(name, help, &[], &bytes.to_string());
        }
    }
    for thread in &process.threads {
        let id = thread.id.to_string();
        let labels = [("thread", thread.name.as_str()), ("tid", &id)];
        families.counter(
            "thread_cpu_seconds",
            "Processor time of a thread; that of a virtual CPU contains the guest's.",
            &labels,
            &seconds(thread.cpu_ns),
        );
        families.counter(
            "thread_waiting_seconds",
            "Time that a thread was ready to run and others had the processor: of a virtual CPU, time stolen from the guest.",
            &labels,
            &seconds(thread.waiting_ns),
        );
    }
}

#[cfg(test)]
mod tests {
    use alveole_counters::Histogram;
    use std::time::Duration;

    use super::*;
    use crate::process::ThreadFacts;

    fn text(form: Form) -> String {
        let set = |name: &str, counts: &[(&str, u64)]| {
            let counts = counts.iter().map(|(n, c)| ((*n).to_owned(), *c));
            (name.to_owned(), counts.collect())
        };
        let histogram = Histogram::new();
        histogram.observe(Duration::from_nanos(3000));
        exposition(
            form,
            &Gauges {
                id: "a\"b\\c".into(),
                version: "1".into(),
                state: "Running".into(),
                guest_memory_bytes: Some(1 << 20),
                first_instruction_us: Some(1_234_567),
                booted_us: None,
            },
            &[
                set(
                    "drive root",
                    &[("reads", 3), ("writes", 4), ("bytes_read", 5)],
                ),
                set("drive data", &[("reads", 6)]),
                set(
                    "vcpu 0",
                    &[("exits_port_read", 7), ("exits_port_read_0x3f8", 7)],
                ),
                set("new thing", &[("odd-name", 1)]),
            ],
            &[(
                "drive root".into(),
                vec![("read".into(), histogram.observed())],
            )],
            Some(&ProcessFacts {
                resident_bytes: Some(4096),
                proportional_bytes: None,
                threads: vec![ThreadFacts {
                    name: "vcpu 0".into(),
                    id: 7,
                    cpu_ns: 1_500_000_000,
                    waiting_ns: 1,
                }],
            }),
        )
    }

    #[test]
    fn families_stand_together_with_their_labels() {
        let text = text(Form::Text);
        let expected = "# HELP alveole_drive_requests_total Requests of the guest that were done.\n\
            # TYPE alveole_drive_requests_total counter\n\
            alveole_drive_requests_total{drive=\"root\",operation=\"read\"} 3\n\
            alveole_drive_requests_total{drive=\"root\",operation=\"write\"} 4\n\
            alveole_drive_requests_total{drive=\"data\",operation=\"read\"} 6\n";
        assert!(text.contains(expected), "{text}");
        for line in [
            "alveole_build_info{version=\"1\",id=\"a\\\"b\\\\c\"} 1",
            "alveole_vcpu_exits_total{vcpu=\"0\",reason=\"port_read\"} 7",
            "alveole_new_odd_name_total{id=\"thing\"} 1",
            "alveole_boot_first_instruction_seconds 1.234567",
            "alveole_thread_cpu_seconds_total{thread=\"vcpu 0\",tid=\"7\"} 1.5",
            "alveole_thread_waiting_seconds_total{thread=\"vcpu 0\",tid=\"7\"} 0.000000001",
            "alveole_process_resident_memory_bytes 4096",
            "alveole_drive_latency_seconds_bucket{drive=\"root\",operation=\"read\",le=\"0.000002048\"} 0",
            "alveole_drive_latency_seconds_bucket{drive=\"root\",operation=\"read\",le=\"0.000004096\"} 1",
            "alveole_drive_latency_seconds_bucket{drive=\"root\",operation=\"read\",le=\"+Inf\"} 1",
            "alveole_drive_latency_seconds_sum{drive=\"root\",operation=\"read\"} 0.000003",
            "alveole_drive_latency_seconds_count{drive=\"root\",operation=\"read\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(!text.contains("0x3f8") && !text.contains("proportional") && !text.contains("EOF"));
    }

    #[test]
    fn open_metrics_names_the_family_and_ends() {
        let text = text(Form::OpenMetrics);
        assert!(
            text.contains("# TYPE alveole_drive_requests counter\nalveole_drive_requests_total{")
        );
        assert!(text.ends_with("\n# EOF\n"));
    }

    #[test]
    fn the_form_is_what_is_asked_for() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        assert_eq!(Form::accepted(prometheus), Form::OpenMetrics);
        assert_eq!(Form::accepted("*/*"), Form::Text);
    }
}
