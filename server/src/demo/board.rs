//! Owns the accounts that sensor, filter and the reader of the cloud's log write, and screen and verdict read.

use std::sync::Arc;

use parking_lot::Mutex;

use super::tally::Tally;

/// The two routes of the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// From the sensor to the filter.
    SensorToFilter,
    /// From the filter to the cloud.
    FilterToCloud,
}

impl Route {
    /// Both, in the order in which a message takes them.
    pub(super) const ALL: [Self; 2] = [Self::SensorToFilter, Self::FilterToCloud];

    /// Its name in the manifest.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SensorToFilter => "sensorToFilter",
            Self::FilterToCloud => "filterToIoTHub",
        }
    }

    /// The endpoint that it leads to, as the hub's status page names it.
    pub(super) fn endpoint(self) -> &'static str {
        match self {
            Self::SensorToFilter => "edge1/filtermodule/input1",
            Self::FilterToCloud => "iothub",
        }
    }

    /// Its place in [`Self::ALL`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::SensorToFilter => 0,
            Self::FilterToCloud => 1,
        }
    }
}

/// All accounts.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    routes: [Tally; 2],
    /// From the sensor through both routes: the readings that the filter lets pass.
    pub(super) end_to_end: Tally,
    /// Messages of other senders that reached the cloud.
    pub(super) others: u64,
    /// What is no message of the demonstration where one should be.
    pub(super) unreadable: u64,
}

impl Accounts {
    /// The account of a route.
    pub(super) fn route(&mut self, route: Route) -> &mut Tally {
        &mut self.routes[route.index()]
    }
}

/// The accounts, shared. The lock is held for one entry at a time, never across an await.
pub(super) type Board = Arc<Mutex<Accounts>>;
