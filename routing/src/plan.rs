//! Owns the plan of a table: all its conditions as families, and the order in which a message meets them.
//!
//! ```text
//! checked trees ─expression─▶ equal ones are one ─clause─▶ conjunctions ─family─▶ one look-up per subject
//! ```
//!
//! The routes are ranked: by endpoint, then by priority, then by name, so the first that is true wins its endpoint and the
//! rest of the endpoint's ranks need not be looked at. A decision begins with the set of the routes that cover the sender,
//! takes the first rank, and looks up the first family of its route that is not known yet for this message. That answers
//! for all routes of the family at once: those whose clause does not hold leave the set. A route whose families have all
//! been looked up and which is still in the set is true. So what a message does not need is never evaluated, a subject is
//! evaluated once however many routes it stands in, and routes that are false cost nothing each.
//!
//! The logic is three-valued. When a subject is undefined, the routes that have no other clause are undefined at once. The
//! others become doubtful: they cannot be true any more, but still false, if another clause is.
//!
//! A table that knows several property names does not ask the message for each: the properties of the message are gone
//! through once, and all routes about properties that it does not have are undefined together.

use std::collections::HashMap;

use smallvec::SmallVec;

use crate::bits::BitSet;
use crate::check::{Checked, Type};
use crate::clause::{Subject, clauses};
use crate::evaluate::{Machine, Scratch};
use crate::expression::{ExpressionId, Expressions};
use crate::family::{Comparable, Family, Member};
use crate::message::{MessageView, SystemProperty};
use crate::program::{Program, Vocabulary};
use crate::table::Target;

/// With that many names in a table, the properties of a message are gone through.
const NAMES_LISTED_MIN: usize = 4;

/// A route on its way into a plan.
pub(crate) struct PlannedRoute {
    pub(crate) target: Target,
    /// None: it has no condition.
    pub(crate) condition: Option<Checked>,
}

/// How the routes of a table are decided.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    ranks: Vec<Rank>,
    families: Vec<Family>,
    vocabulary: Vocabulary,
    /// By name: the family whose subject is the property of that name.
    of_name: Vec<Option<u32>>,
    /// The routes that have no other clause than one about a property.
    of_properties: BitSet,
}

#[derive(Debug)]
struct Rank {
    target: Target,
    /// The rank after the last one of the endpoint.
    end: usize,
    families: SmallVec<[u32; 2]>,
}

/// What the decisions about one source begin with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    pending: BitSet,
    /// None: no family is known beforehand.
    answered: Option<Box<Answered>>,
}

/// What families that are the same for all messages of a source have answered.
#[derive(Clone, Debug)]
struct Answered {
    doubtful: BitSet,
    undefined: BitSet,
    known: BitSet,
}

/// Memory that is reused from decision to decision.
#[derive(Debug, Default)]
pub(crate) struct PlanScratch {
    evaluation: Scratch,
    /// Routes that may still be true, or doubtful.
    pending: BitSet,
    /// Routes of which a clause is undefined; empty between decisions, as the next two are.
    doubtful: BitSet,
    undefined: BitSet,
    /// Families that have been looked up.
    known: BitSet,
    absent: BitSet,
}

impl Plan {
    /// The plan of these routes, which are in the order of their ranks.
    pub(crate) fn new(routes: Vec<PlannedRoute>) -> Plan {
        let count = routes.len();
        let mut expressions = Expressions::default();
        let ids: Vec<Vec<ExpressionId>> = routes
            .iter()
            .map(|route| route.condition.as_ref().map_or_else(Vec::new, |tree| expressions.add(tree)))
            .collect();
        let mut numbers: HashMap<Subject, u32> = HashMap::new();
        let mut members: Vec<Vec<Member>> = Vec::new();
        let mut ranks: Vec<Rank> = Vec::with_capacity(count);
        for (rank, (route, ids)) in routes.iter().zip(&ids).enumerate() {
            let clauses =
                route.condition.as_ref().map_or_else(Vec::new, |tree| clauses(tree, ids, &expressions));
            let only = clauses.len() == 1;
            let mut families = SmallVec::new();
            for clause in clauses {
                let family = *numbers.entry(clause.subject).or_insert_with(|| {
                    members.push(Vec::new());
                    members.len() as u32 - 1
                });
                families.push(family);
                if let Some(members) = members.get_mut(family as usize) {
                    members.push(Member { route: rank, clause, only });
                }
            }
            let same = |other: &&PlannedRoute| other.target.endpoint == route.target.endpoint;
            let end = rank + routes.iter().skip(rank).take_while(same).count();
            ranks.push(Rank { target: route.target, end, families });
        }

        let subjects = members.iter().filter_map(|members| members.first()).map(|first| {
            let (Subject::Value(subject) | Subject::Truth(subject)) = first.clause.subject;
            subject
        });
        let kept = expressions.kept(subjects);
        let mut plan = Plan { ranks, of_properties: BitSet::new(count), ..Plan::default() };
        for members in &members {
            let Some(first) = members.first() else { continue };
            let route = routes.get(first.route).zip(ids.get(first.route));
            let Some((tree, ids)) = route.and_then(|(route, ids)| route.condition.as_ref().zip(Some(ids)))
            else {
                continue;
            };
            let kept: Vec<Option<u32>> = ids.iter().map(|id| kept.get(id).copied()).collect();
            let node = first.clause.node;
            let body = tree.nodes.get(node).is_some_and(|node| node.result == Type::Body);
            let (subject, comparable) = match first.clause.subject {
                Subject::Truth(_) => {
                    (Program::of_truth(tree, node, &kept, &mut plan.vocabulary), Comparable::Truth)
                }
                Subject::Value(_) => {
                    let comparable = if body { Comparable::Body } else { Comparable::Typed };
                    (Program::of_value(tree, node, &kept, &mut plan.vocabulary), comparable)
                }
            };
            plan.families.push(Family::new(subject, comparable, members, count));
        }
        plan.of_name = vec![None; plan.vocabulary.names()];
        for (number, family) in plan.families.iter().enumerate() {
            let name = family.subject.property().and_then(|name| plan.of_name.get_mut(name as usize));
            if let Some(of_name) = name {
                *of_name = Some(number as u32);
                plan.of_properties.add(&family.only);
            }
        }
        plan
    }

    /// What a decision about these ranks, which are ascending, begins with. Those that can never win, because one before
    /// them always does, are left out.
    pub(crate) fn start(&self, ranks: impl Iterator<Item = usize>) -> Start {
        let mut pending = BitSet::new(self.ranks.len());
        let mut taken = 0;
        for rank in ranks {
            let Some(own) = self.ranks.get(rank).filter(|_| rank >= taken) else { continue };
            pending.insert(rank);
            if own.families.is_empty() {
                taken = own.end;
            }
        }
        Start { pending, answered: None }
    }

    /// Looks up the families whose subject is the same for all messages in which the system properties for which
    /// `constant` is true are those of `message`.
    pub(crate) fn fold<M: MessageView + ?Sized>(
        &self,
        start: &mut Start,
        message: &M,
        constant: impl Fn(SystemProperty) -> bool,
    ) {
        let mut evaluation = Scratch::default();
        evaluation.begin_message();
        let mut machine = Machine::new(&self.vocabulary, message, &mut evaluation);
        let empty = || BitSet::new(self.ranks.len());
        let mut answered =
            Answered { doubtful: empty(), undefined: empty(), known: BitSet::new(self.families.len()) };
        for (number, family) in self.families.iter().enumerate() {
            if !family.subject.is_constant(&self.vocabulary, &constant) {
                continue;
            }
            answered.known.insert(number);
            match machine.holding(family) {
                Some(holding) => start.pending.keep(&family.members, holding),
                None => {
                    start.pending.move_to(&family.only, &mut answered.undefined);
                    answered.doubtful.add(&family.members);
                }
            }
        }
        start.answered = answered.known.next(0).is_some().then(|| Box::new(answered));
    }

    /// Decides where `message` goes, of the routes with which `start` begins; gives the number of conditions that were undefined.
    pub(crate) fn decide<M: MessageView + ?Sized>(
        &self,
        start: &Start,
        message: &M,
        scratch: &mut PlanScratch,
        mut take: impl FnMut(Target),
    ) -> u32 {
        if start.pending.next(0).is_none() {
            return start.answered.as_ref().map_or(0, |answered| answered.undefined.count());
        }
        let PlanScratch { evaluation, pending, doubtful, undefined, known, absent } = scratch;
        for set in [&mut *pending, &mut *doubtful, &mut *undefined, &mut *absent] {
            set.fit(self.ranks.len());
        }
        known.fit(self.families.len());
        pending.copy(&start.pending);
        let mut all_defined = true;
        if let Some(answered) = &start.answered {
            doubtful.copy(&answered.doubtful);
            undefined.copy(&answered.undefined);
            known.copy(&answered.known);
            all_defined = false;
        }
        evaluation.begin_message();
        let mut machine = Machine::new(&self.vocabulary, message, evaluation);
        let mut listed = self.of_name.len() < NAMES_LISTED_MIN;
        let mut at = 0;
        while let Some(rank) = pending.next(at) {
            at = rank;
            let Some(own) = self.ranks.get(rank) else { break };
            let due = own.families.iter().find(|family| !known.contains(**family as usize));
            if let Some((number, family)) =
                due.and_then(|due| Some((*due, self.families.get(*due as usize)?)))
            {
                if !listed && family.subject.asks_properties() {
                    listed = true;
                    if let Some(present) = machine.list_properties() {
                        absent.copy(&self.of_properties);
                        for name in present {
                            let family = self.of_name.get(*name as usize).copied().flatten();
                            if let Some(family) = family.and_then(|family| self.families.get(family as usize))
                            {
                                absent.subtract(&family.only);
                            }
                        }
                        pending.move_to(absent, undefined);
                        all_defined = false;
                        continue;
                    }
                }
                known.insert(number as usize);
                match machine.holding(family) {
                    Some(holding) => pending.keep(&family.members, holding),
                    None => {
                        all_defined = false;
                        pending.move_to(&family.only, undefined);
                        doubtful.add(&family.members);
                    }
                }
                continue;
            }
            if doubtful.contains(rank) {
                undefined.insert(rank);
                pending.remove(rank);
            } else {
                take(own.target);
                pending.remove(rank);
                if own.end > rank + 1 {
                    pending.remove_range(rank, own.end);
                    undefined.remove_range(rank, own.end);
                }
            }
        }
        known.clear();
        if all_defined {
            return 0;
        }
        let count = undefined.count();
        undefined.clear();
        doubtful.clear();
        count
    }
}
