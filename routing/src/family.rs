//! Owns the families: what all clauses of a table about one subject say is answered by one look-up.
//!
//! The literals that the clauses compare the subject with divide the values that it can have into regions: below the
//! first literal, equal to it, between it and the second, and so on. In one region no clause changes its value, so the
//! routes whose clause holds there are written down when the table is compiled. A message then costs, per family, one
//! evaluation of the subject and one binary search, however many routes compare it with whatever. A subject that is
//! undefined, or a text that is null, makes the clauses of all routes undefined.

use std::cmp::Ordering;

use crate::bits::BitSet;
use crate::clause::{Clause, Literal};
use crate::program::Program;

/// Which values of a subject have a place among the literals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparable {
    /// Numbers that are not NaN, texts and truth values: the subject is of one type.
    Typed,
    /// Truth values only.
    Truth,
    /// Everything that is defined.
    Body,
}

/// All clauses about one subject.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) subject: Program,
    pub(crate) comparable: Comparable,
    /// Ascending, each once.
    literals: Vec<Literal>,
    /// The routes whose clause holds: below the first literal, equal to it, between it and the second, …
    holds: Vec<BitSet>,
    /// The routes that have a clause here.
    pub(crate) members: BitSet,
    /// Those of them that have no other clause.
    pub(crate) only: BitSet,
}

/// A clause of a route; routes are counted in the order in which they are decided.
pub(crate) struct Member {
    pub(crate) route: usize,
    pub(crate) clause: Clause,
    /// The condition has no other clause.
    pub(crate) only: bool,
}

impl Family {
    /// The family of these clauses about `subject`, in a table of `routes` routes.
    pub(crate) fn new(subject: Program, comparable: Comparable, clauses: &[Member], routes: usize) -> Family {
        let mut literals: Vec<Literal> =
            clauses.iter().flat_map(|member| member.clause.literals.iter().cloned()).collect();
        literals.sort_by(Literal::order);
        literals.dedup_by(|next, literal| next.order(literal).is_eq());
        let empty = BitSet::new(routes);
        let mut family = Family {
            subject,
            comparable,
            holds: vec![empty.clone(); 2 * literals.len() + 1],
            literals,
            members: empty.clone(),
            only: empty,
        };
        for member in clauses {
            family.add(member);
        }
        family
    }

    fn add(&mut self, Member { route, clause, only }: &Member) {
        self.members.insert(*route);
        if *only {
            self.only.insert(*route);
        }
        let place = |literal: &Literal| self.literals.partition_point(|known| known.order(literal).is_lt());
        let regions: Vec<usize> = clause.literals.iter().map(|literal| 2 * place(literal) + 1).collect();
        // Between its own literals a clause does not change its value.
        let mut ends: Vec<usize> = regions.iter().flat_map(|region| [*region, region + 1]).collect();
        ends.push(self.holds.len());
        ends.sort_unstable();
        let mut first = 0;
        for end in ends {
            let holds = first < end
                && clause.holds(|literal| regions.get(literal).map_or(Ordering::Equal, |own| first.cmp(own)));
            if holds {
                self.holds.iter_mut().take(end).skip(first).for_each(|region| region.insert(*route));
            }
            first = end;
        }
    }

    /// The routes whose clause holds for a subject that stands in this order to the literals.
    #[inline]
    pub(crate) fn holding(&self, mut order: impl FnMut(&Literal) -> Ordering) -> Option<&BitSet> {
        let region = match self.literals.binary_search_by(|literal| order(literal).reverse()) {
            Ok(equal) => 2 * equal + 1,
            Err(below) => 2 * below,
        };
        self.holds.get(region)
    }
}
