"""By what operators find workflows. They are registered where the server allows it; without them all else works."""

from temporalio.common import SearchAttributeKey

ORGANIZATION = SearchAttributeKey.for_keyword("ScripOrganization")
PROGRAM = SearchAttributeKey.for_keyword("ScripProgram")
PARTICIPANT = SearchAttributeKey.for_keyword("ScripParticipant")
STATUS = SearchAttributeKey.for_keyword("ScripStatus")
SEARCH_ATTRIBUTES = (ORGANIZATION, PROGRAM, PARTICIPANT, STATUS)
