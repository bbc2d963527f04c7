//! Compiles rules into a block of BPF that can be put before another one.
//!
//! `seccompiler` makes a whole filter, which ends with an answer. In a block, "no rule fits" is not an
//! answer but a jump past the block's end: the next block is asked, and after the last one stands the
//! refusal. So a role's filter is its base and the fragments of its devices, one after the other.
//!
//! Nor does it look for a call's number one after the other, as `seccompiler` would: a block is a search that halves what is
//! left. When a thread enters a filter, the kernel tries it with each call there is, and keeps which are allowed whatever their
//! arguments; of the others, as the `ioctl` that runs a processor, it asks the filter each time. Only what belongs to one call,
//! the comparisons of its arguments, is `seccompiler`'s.
//!
//! Deliberately does not know: roles, devices, files.

use std::collections::BTreeMap;

pub(crate) use seccompiler::sock_filter as Instruction;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::policy::{Condition, Rule, Test};

/// Stands in a block where the process id will be; `enter` replaces it.
pub(crate) const PID_MARKER: u32 = u32::from_be_bytes(*b"PID!");

/// An answer that no rule gives: `SECCOMP_RET_TRACE` with our marker.
const NO_RULE_FITS: SeccompAction = SeccompAction::Trace(0x7e57);

const RETURN: u16 = 0x06;
const COMPARE_EQUAL: u16 = 0x15;
const COMPARE_FROM: u16 = 0x35;
const JUMP: u16 = 0x05;

/// How `seccompiler` begins: with three instructions that end a process which calls by another architecture's table.
const ARCHITECTURE: usize = 3;
/// Loads the number of the call.
const LOAD_NUMBER: Instruction = Instruction {
    code: 0x20,
    jt: 0,
    jf: 0,
    k: 0,
};
/// What `seccompiler` puts before the rules of a call when it knows no other: the architecture, the number, a comparison with it.
const BEFORE_RULES: usize = ARCHITECTURE + 2;
/// So few calls are compared one after the other.
const FEW_CALLS: usize = 2;

/// A call, and what is done about it.
type Call = (u32, Vec<Instruction>);

/// Compiles `rules`, of which one at least must fit for the call to be allowed.
pub(crate) fn block(rules: &[&Rule]) -> Result<Vec<Instruction>, seccompiler::BackendError> {
    let mut by_number: BTreeMap<i64, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        by_number.entry(rule.number).or_default().push(rule);
    }
    let calls: Result<Vec<Call>, _> = by_number.iter().map(|(n, rules)| call(*n, rules)).collect();
    let mut block = compile(0, Vec::new())?;
    block.truncate(ARCHITECTURE);
    block.push(LOAD_NUMBER);
    block.extend(search(&calls?));
    let no_rule_fits = u32::from(NO_RULE_FITS);
    let last = block.len() - 1;
    for (at, i) in block.iter_mut().enumerate() {
        if i.code == RETURN && i.k == no_rule_fits {
            // A jump of 0 goes to the next instruction, which for the last one is the next block.
            *i = jump(last - at);
        }
    }
    let marked = block.iter().filter(|i| i.k == PID_MARKER);
    let wanted = rules.iter().flat_map(|rule| &rule.args);
    let wanted = wanted.filter(|arg| arg.test == Test::IsOwnProcess).count();
    assert!(
        marked.clone().count() == wanted && marked.clone().all(|i| i.code == COMPARE_EQUAL),
        "a rule compares with {PID_MARKER:#x}, which stands for the process id"
    );
    Ok(block)
}

/// What is done about the call `number`, which `rules` are for.
fn call(number: i64, rules: &[&Rule]) -> Result<Call, seccompiler::BackendError> {
    let key = u32::try_from(number).unwrap_or(u32::MAX);
    if rules.iter().any(|rule| rule.args.is_empty()) {
        return Ok((key, vec![answer(SeccompAction::Allow)]));
    }
    let mut chain = Vec::new();
    for rule in rules {
        let conditions: Result<_, _> = rule.args.iter().map(condition).collect();
        chain.push(SeccompRule::new(conditions?)?);
    }
    let mut filter = compile(number, chain)?;
    // Its end is there twice: for the call when no rule fits, and for other calls.
    filter.pop();
    Ok((key, filter.split_off(BEFORE_RULES)))
}

/// A filter by `seccompiler`, of one call.
fn compile(number: i64, chain: Vec<SeccompRule>) -> Result<BpfProgram, seccompiler::BackendError> {
    let by_number = BTreeMap::from([(number, chain)]);
    let (allow, arch) = (SeccompAction::Allow, TargetArch::x86_64);
    BpfProgram::try_from(SeccompFilter::new(by_number, NO_RULE_FITS, allow, arch)?)
}

/// Finds one of `calls`, which ascend, by the number that is loaded.
fn search(calls: &[Call]) -> Vec<Instruction> {
    let mut found = Vec::new();
    if calls.len() <= FEW_CALLS {
        for (number, chain) in calls {
            found.extend(unless(COMPARE_EQUAL, *number, chain.len(), false));
            found.extend_from_slice(chain);
        }
        found.push(answer(NO_RULE_FITS));
        return found;
    }
    let (low, high) = calls.split_at(calls.len() / 2);
    let below = search(low);
    found.extend(unless(COMPARE_FROM, high[0].0, below.len(), true));
    found.extend(below);
    found.extend(search(high));
    found
}

/// Compares the number with `k`, and jumps over `over` instructions if the outcome is `outcome`. A comparison by itself can jump
/// over 255.
fn unless(code: u16, k: u32, over: usize, outcome: bool) -> Vec<Instruction> {
    let compare = |holds, fails| {
        let (jt, jf) = if outcome {
            (holds, fails)
        } else {
            (fails, holds)
        };
        Instruction { code, jt, jf, k }
    };
    match u8::try_from(over) {
        Ok(over) => vec![compare(over, 0)],
        Err(_) => vec![compare(0, 1), jump(over)],
    }
}

fn jump(over: usize) -> Instruction {
    Instruction {
        code: JUMP,
        jt: 0,
        jf: 0,
        k: u32::try_from(over).unwrap_or(u32::MAX),
    }
}

fn answer(action: SeccompAction) -> Instruction {
    Instruction {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: u32::from(action),
    }
}

/// All arguments are compared as 32 bits: every condition so far is on an `int` or on flags below
/// bit 32, whose upper half the kernel ignores.
fn condition(c: &Condition) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (op, value) = match c.test {
        Test::Is(value) => (SeccompCmpOp::Eq, value),
        Test::IsOwnProcess => (SeccompCmpOp::Eq, PID_MARKER),
        Test::Lacks(bits) => (SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
    };
    SeccompCondition::new(c.index, SeccompCmpArgLen::Dword, op, u64::from(value))
}
