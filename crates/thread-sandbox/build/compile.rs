//! Compiles rules into a block of BPF that can be put before another one.
//!
//! `seccompiler` makes a whole filter, which ends with an answer. In a block, "no rule fits" is not an
//! answer but a jump past the block's end: the next block is asked, and after the last one stands the
//! refusal. So a role's filter is its base and the fragments of its devices, one after the other.
//!
//! Most rules allow a call whatever its arguments. Of such a one `seccompiler` makes five instructions; here it is one
//! comparison. The kernel translates a filter, and tries it with each call there is, when a thread enters it: before the API
//! answers for the first time, and before a processor runs.
//!
//! Deliberately does not know: roles, devices, files.

use std::collections::{BTreeMap, BTreeSet};

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
/// How far a comparison can jump.
const FARTHEST: usize = u8::MAX as usize;

/// Compiles `rules`, of which one at least must fit for the call to be allowed.
pub(crate) fn block(rules: &[&Rule]) -> Result<Vec<Instruction>, seccompiler::BackendError> {
    let unconditional = rules.iter().filter(|rule| rule.args.is_empty());
    let unconditional: BTreeSet<i64> = unconditional.map(|rule| rule.number).collect();
    let mut by_number: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        if !unconditional.contains(&rule.number) {
            let conditions: Result<_, _> = rule.args.iter().map(condition).collect();
            let chain = by_number.entry(rule.number).or_default();
            chain.push(SeccompRule::new(conditions?)?);
        }
    }
    let no_rule_fits = u32::from(NO_RULE_FITS);
    let filter = SeccompFilter::new(
        by_number,
        NO_RULE_FITS,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let mut block = BpfProgram::try_from(filter)?;
    let last = block.len() - 1;
    for (at, i) in block.iter_mut().enumerate() {
        if i.code == RETURN && i.k == no_rule_fits {
            // A jump of 0 goes to the next instruction, which for the last one is the next block.
            (i.code, i.k) = (JUMP, u32::try_from(last - at).unwrap_or(u32::MAX));
        }
    }
    let unconditional: Vec<_> = unconditional.into_iter().collect();
    for numbers in unconditional.chunks(FARTHEST) {
        block.splice(ARCHITECTURE..ARCHITECTURE, allow(numbers));
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

/// Allows the calls of these `numbers`, at most [`FARTHEST`]; runs on for others.
fn allow(numbers: &[i64]) -> Vec<Instruction> {
    let instruction = |code, jt, k| Instruction { code, jt, jf: 0, k };
    let mut block = vec![LOAD_NUMBER];
    for (at, number) in numbers.iter().enumerate() {
        // Over the comparisons that follow, and the jump past the answer.
        let over = u8::try_from(numbers.len() - at).unwrap_or(u8::MAX);
        block.push(instruction(
            COMPARE_EQUAL,
            over,
            u32::try_from(*number).unwrap_or(u32::MAX),
        ));
    }
    block.push(instruction(JUMP, 0, 1));
    block.push(instruction(RETURN, 0, u32::from(SeccompAction::Allow)));
    block
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
